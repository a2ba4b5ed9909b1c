"""What does a pipeline lose that sends activations and gradients in few bits?

    python -m benchmarks.pipeline_loss             # minutes; resumes; writes results/pipeline_loss.json

examples/pipeline.py: the byte-level language model in two stages, two processes, 100 steps of 8 texts in four
microbatches; three seeds. Two bits are the control: they should lose.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._common import Cells, shows_only
from benchmarks._places import example
from tests.cluster import Cluster

SEEDS, STEPS = 3, 100
CODECS = ("none", "qsgd:bits=8", "qsgd:bits=4", "qsgd:bits=2")


def job(rank: int, size: int, arguments: list[str]) -> dict[str, Any] | None:
    """What one of the processes does, its process group up."""
    example("bytes_lm")
    pipeline = example("pipeline")
    result: dict[str, Any] | None = pipeline.train(pipeline.options(arguments))
    return result


def trained(cluster: Cluster, codec: str, seed: int) -> dict[str, Any]:
    arguments = ["--codec", codec, "--seed", str(seed), "--steps", str(STEPS)]
    result: dict[str, Any] = cluster.run(job, arguments)[-1]
    return result


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By codec: test losses, how far each is above float32's of its seed, and bytes."""
    table: dict[str, dict[str, Any]] = {}
    for codec in CODECS:
        seeds = [seed for seed in range(SEEDS) if f"{codec} | seed {seed}" in cells]
        runs = [cells[f"{codec} | seed {seed}"] for seed in seeds]
        if runs:
            plain = [cells[f"none | seed {seed}"]["test_loss"] for seed in seeds]
            losses = [run["test_loss"] for run in runs]
            above = [loss - reference for loss, reference in zip(losses, plain, strict=True)]
            table[codec] = {
                "test_losses": losses,
                "mean": statistics.mean(losses),
                "above": {"mean": statistics.mean(above), "range": [min(above), max(above)]},
                "bytes_per_microbatch": runs[0]["bytes_per_microbatch"],
                "smaller": runs[0]["float32_bytes"] / runs[0]["bytes_per_microbatch"],
            }
    return table


def main() -> None:
    show_only = shows_only(__doc__)
    cells = Cells("pipeline_loss", {"steps": STEPS, "seeds": SEEDS, "codecs": list(CODECS)})
    cluster = None if show_only else Cluster(2, patience_s=900)
    for seed in range(SEEDS if cluster else 0):
        for codec in CODECS:
            cells.get(f"{codec} | seed {seed}", lambda c=codec, s=seed: trained(cluster, c, s))
    if cluster is not None:
        cluster.close()
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for codec, row in cells.document["table"].items():
        print(codec, row)


if __name__ == "__main__":
    main()
