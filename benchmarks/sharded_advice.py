"""How far is the advice on a sharded step from the step? ``distcomp advise`` first, then emulation.

    python -m benchmarks.sharded_advice --rate 100mbit    # resumes; writes results/sharded_advice.json
    python -m benchmarks.sharded_advice --show            # prints the table of what is there

Four ranks that share this machine; an MLP of 4.2 million parameters on FSDP2 (some rows: 1 million). The
advice is that of one process, which has no network and one rank, and runs the loop of
``benchmarks/_sharded_loop.py`` alone: it knows nothing of what is measured. A step lasts from its start to
the start of the next, in the mean over the ranks; the median counts. Two figures of the model
(``LATE_IN_A_RING``, ``HOOKED_CORE_S``) were fitted to these rows, except for those "after the fit", which
were predicted and measured afterwards.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch.distributed as dist

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, median, on_network, start
from benchmarks._places import ROOT
from benchmarks._sharded_loop import made

RANKS, WARM, STEPS = 4, 2, 5
KEPT = "gather:compressor=(qsgd:bits=8),reuse=true"
MOVED = "difference:compressor=(qsgd:bits=4)"
PLAIN = "fsdp2"
FOUR = "qsgd:bits=4"
UNSEEN = "sharded over 4, after the fit"
SHAPES = {"4.2 million": (1024, 4), "1.0 million": (512, 4), "3.5 million": (768, 6)}
GROUPS: dict[str, tuple[str, int, int, tuple[str, ...]]] = {
    "sharded over 4": (
        "4.2 million", 1, 4,
        (PLAIN, "identity", FOUR, f"{FOUR} weights=qsgd:bits=8", f"{FOUR} weights=qsgd:bits=4",
         f"{FOUR} weights={KEPT}", f"{FOUR} weights={MOVED}", f"qsgd:bits=1 weights={MOVED}"),
    ),
    "weights kept after the forward": (
        "4.2 million", 0, 4, (PLAIN, FOUR, f"{FOUR} weights=qsgd:bits=8"),
    ),
    "2 replicas of 2 shards": ("4.2 million", 1, 2, (PLAIN, "identity", FOUR, "qsgd:bits=1")),
    "sharded over 4, smaller": (
        "1.0 million", 1, 4, (PLAIN, f"{FOUR} weights=qsgd:bits=8", f"{FOUR} weights={MOVED}"),
    ),
    UNSEEN: (
        "3.5 million", 1, 4, (PLAIN, FOUR, f"{FOUR} weights=qsgd:bits=8", f"qsgd:bits=1 weights={MOVED}"),
    ),
}  # fmt: skip
"""Size, whether weights are gathered again for the backward, shards, and what is compared."""


def advised(group: str, rate: str) -> dict[str, Any]:
    """What the command says of the settings of a group."""
    size, reshard, shards, settings = GROUPS[group]
    command = [
        sys.executable, "-m", "distcomp", "advise", "--ranks", str(RANKS), "--ranks-here", str(RANKS),
        "--rate", rate, "--shards", str(shards), "--methods", ";".join(settings), "--json",
        "--model", str(ROOT / "benchmarks" / "_sharded_loop.py"), *map(str, (*SHAPES[size], reshard, shards)),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise distcomp.DistcompError(done.stderr[-3000:])
    said = json.loads(done.stdout)
    predicted = {row["method"]: row["prediction"] for row in said["methods"]}
    return {"compute_s": said["compute_s"], "noise": said["noise"], "predicted": predicted}


def rank_main(settings: Any) -> dict[str, Any]:
    """The steps of one setting."""
    method, _, weights = settings["setting"].partition(" weights=")
    plain, shards = method == PLAIN, settings["shards"]
    model, optimizer, step, mesh = made(*settings["shape"], settings["reshard"], shards, hybrid=plain)
    handle = None
    if not plain:
        replicas = mesh["replicate"] if shards < RANKS else None
        handle = distcomp.attach(model, optimizer, method, weights=weights or None, replicas=replicas)
    for _ in range(WARM):
        step()
    dist.barrier()
    starts_s = []
    for _ in range(1 + STEPS):
        starts_s.append(time.perf_counter())
        step()
    mine = [later - sooner for sooner, later in itertools.pairwise(starts_s)]
    together = list(zip(*gathered(mine), strict=True))
    if handle is not None:
        handle.detach()
    return {"steps_s": [statistics.fmean(one) for one in together]}


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What was predicted beside what was measured."""
    table = {}
    for key, cell in cells.items():
        rate, group, setting = key.split(" | ")
        if setting != "advice":
            said = cells[f"{rate} | {group} | advice"]["predicted"][setting]
            took_s = median(cell["steps_s"])
            table[key] = {
                "predicted_s": said["step_s"], "measured_s": took_s, "error": said["step_s"] / took_s - 1,
                "sent_bytes": said["sent_bytes"],
            }  # fmt: skip
    return table


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rate", help="of each link: measure there")
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), help="of settings (default all)")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    asked = parser.parse_args()
    cells = Cells("sharded_advice", {"ranks": RANKS, "warm_steps": WARM, "steps": STEPS})
    for group in [] if asked.show or not asked.rate else asked.groups:
        size, reshard, shards, settings = GROUPS[group]
        key = f"{asked.rate} | {group}"
        cells.get(f"{key} | advice", lambda group=group: advised(group, asked.rate))
        for setting in settings:
            told = {"setting": setting, "shape": SHAPES[size], "reshard": bool(reshard), "shards": shards}
            cells.get(
                f"{key} | {setting}",
                lambda told=told: on_network("sharded_advice", RANKS, asked.rate, told),
            )
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for name, row in cells.document["table"].items():
        print(f"{name:<100}{row['predicted_s']:9.3f}{row['measured_s']:9.3f} s{row['error']:+8.1%}")


if __name__ == "__main__":
    start(main, rank_main)
