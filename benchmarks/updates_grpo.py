"""Reinforcement learning in miniature, by updates and by whole weights: the same rewards, which bytes?

    python -m benchmarks.updates_grpo              # minutes; resumes; writes results/updates_grpo.json

examples/grpo.py: one trainer and two samplers as processes, 200 steps, three seeds, at three learning rates.
Updates are lossless, so the rewards must be the same to the last digit; the bytes depend on the rate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks._common import Cells, shows_only
from benchmarks._places import EXAMPLES

SEEDS, STEPS, RATES = 3, 200, ("1e-3", "1e-4", "1e-5")
WEIGHTS = ("updates", "whole")


def trained(weights: str, rate: str, seed: int) -> dict[str, Any]:
    script = [str(EXAMPLES / "grpo.py"), "--weights", weights, "--lr", rate, "--seed", str(seed)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*start, *script, "--steps", str(STEPS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _name(weights: str, rate: str, seed: int) -> str:
    return f"{weights} | rate {rate} | seed {seed}"


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By rate: rewards by either way, whether they are the same, and how many times fewer bytes."""
    table: dict[str, dict[str, Any]] = {}
    for rate in RATES:
        pairs = [
            (cells[_name("updates", rate, seed)], cells[_name("whole", rate, seed)])
            for seed in range(SEEDS)
            if _name("whole", rate, seed) in cells
        ]
        if pairs:
            table[rate] = {
                "seeds": len(pairs),
                "rewards": [sent["reward"] for sent, _ in pairs],
                "same_rewards": all(sent["reward"] == whole["reward"] for sent, whole in pairs),
                "identical": all(sent["identical"] for sent, _ in pairs),
                "smaller": statistics.mean(whole["sent_bytes"] / sent["sent_bytes"] for sent, whole in pairs),
            }
    return table


def main() -> None:
    show_only = shows_only(__doc__)
    cells = Cells("updates_grpo", {"steps": STEPS, "seeds": SEEDS, "rates": list(RATES)})
    for seed in range(0 if show_only else SEEDS):
        for rate in RATES:
            for weights in WEIGHTS:
                cells.get(_name(weights, rate, seed), lambda w=weights, r=rate, s=seed: trained(w, r, s))
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for rate, row in cells.document["table"].items():
        print(rate, row)


if __name__ == "__main__":
    main()
