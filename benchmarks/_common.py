"""What the benchmarks share: an emulated network of ranks, and a result file that says where its numbers come
from."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import distcomp
from distcomp.network import Fabric, emulate
from distcomp.network.launch import show_nothing
from distcomp.recording import surroundings

RESULTS = Path(__file__).parent / "results"


def on_network(
    script: str, ranks: int, rate: str, env: Mapping[str, str], delay: str = "0ms"
) -> dict[str, Any]:
    """As :func:`on_fabric`, with equal links."""
    return on_fabric(script, Fabric.uniform(ranks, rate, delay), env)


def on_fabric(script: str, fabric: Fabric, env: Mapping[str, str]) -> dict[str, Any]:
    """Run ``script`` on every rank of an emulated network; what rank 0 prints as its last line is JSON.

    Returns that, with what the network's self-test measured.
    """
    with emulate(fabric) as net:
        for line in net.describe():
            print(line, file=sys.stderr)
        result = net.launch([sys.executable, script], env=dict(env), show=show_nothing)
        if not result.ok:
            failed = result.first_failure or 0
            raise distcomp.DistcompError(
                f"{script} failed on rank {failed}: {result.outputs[failed][-3000:]}"
            )
        lines = [line for line in result.outputs[0].splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1])
        return {"network": net.describe(), "real_packets": net.real_packets, **found}


def write(name: str, result: Mapping[str, Any], seed: int = 0) -> Path:
    """``benchmarks/results/<name>.json``: the result, and host, torch, commit, seed and date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    about = surroundings(Path(__file__).parent)
    path.write_text(json.dumps({"seed": seed, **about, **result}, indent=1, sort_keys=False) + "\n")
    return path


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
