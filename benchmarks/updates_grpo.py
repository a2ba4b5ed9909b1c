"""Reinforcement learning in miniature, by updates and by whole weights: the same rewards, which bytes?

    python -m benchmarks.updates_grpo              # minutes; resumes; writes results/updates_grpo.json

examples/grpo.py: one trainer and two samplers as processes, 40 steps, three seeds, at two learning rates.
Updates are lossless, so the rewards must be the same to the last digit; the bytes depend on the rate.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._common import Cells, shows_only
from benchmarks._places import example
from tests.cluster import Cluster

SEEDS, STEPS, RATES = 3, 40, ("1e-3", "1e-4")
WEIGHTS = ("updates", "whole")


def job(rank: int, size: int, arguments: list[str]) -> dict[str, Any] | None:
    """What one of the processes does, its process group up."""
    grpo = example("grpo")
    result: dict[str, Any] | None = grpo.train(grpo.options(arguments))
    return result


def trained(cluster: Cluster, weights: str, rate: str, seed: int) -> dict[str, Any]:
    arguments = ["--weights", weights, "--lr", rate, "--seed", str(seed), "--steps", str(STEPS)]
    result: dict[str, Any] = cluster.run(job, arguments)[0]
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
    cluster = None if show_only else Cluster(3, patience_s=900)
    for seed in range(SEEDS if cluster else 0):
        for rate in RATES:
            for weights in WEIGHTS:
                cells.get(
                    _name(weights, rate, seed), lambda w=weights, r=rate, s=seed: trained(cluster, w, r, s)
                )
    if cluster is not None:
        cluster.close()
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for rate, row in cells.document["table"].items():
        print(rate, row)


if __name__ == "__main__":
    main()
