"""How long the others wait for a rank that stops short: every way of the tests, on 2 and 3 processes.

    python -m benchmarks.bounded_waits             # writes results/bounded_waits.json

Each way in which a backward, a rank or a script can stop short, as in the tests, with
a ``timeout_s`` of 6. Measured on each survivor from the moment at which the way begins until ``detach()`` has
returned; a row holds the slowest survivor's seconds and the sentence that all of them say. The target is
``timeout_s`` and 5 s more. A way whose survivors do not say one sentence that names the rank ends the run.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks._common import write
from distcomp.transports.verdict import REMEDY
from tests.attaching.ddp.test_bounded import (
    ENDS,
    PATIENCE_S,
    TIMEOUT_S,
    WAYS,
    Rank,
    check,
    stop_short,
    victim_of,
)
from tests.cluster import Cluster

TARGET_S = TIMEOUT_S + 5


def timed(rank: int, size: int, way: str) -> tuple[str, str, list[str], float]:
    """What this rank is told, of which type, which threads are left, and the seconds until it had left."""
    one = Rank(rank, size, **(WAYS | ENDS)[way][0])
    began_s = time.perf_counter()
    return *stop_short(one, way), time.perf_counter() - began_s


def row(way: str, size: int) -> dict[str, Any]:
    """The slowest survivor of one way, and what all of them say."""
    victim, reason = victim_of(way, size), (WAYS | ENDS)[way][2]
    cluster = Cluster(size, PATIENCE_S)
    try:
        answers = cluster.results(timed, way, without=victim if way in ENDS else None)
    finally:
        cluster.close()
    survivors = [answer for rank, answer in enumerate(answers) if rank != victim]
    check([answer[:3] if isinstance(answer, tuple) else answer for answer in answers], victim, reason)
    return {
        "way": way,
        "ranks": size,
        "seconds": round(max(answer[3] for answer in survivors), 2),
        "sentence": survivors[0][0].split(f"; {REMEDY}")[0],
    }


def main() -> None:
    rows = []
    for way in WAYS | ENDS:
        for size in (2, 3):
            rows.append(row(way, size))
            print(f"{rows[-1]['seconds']:7.2f} s  {size} ranks  {way}", flush=True)
    late = [one for one in rows if one["seconds"] > TARGET_S]
    write(
        "bounded_waits",
        {
            "what": (__doc__ or "").splitlines()[0],
            "timeout_s": TIMEOUT_S,
            "target_s": TARGET_S,
            "slowest_s": max(one["seconds"] for one in rows),
            "beyond_target": len(late),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
