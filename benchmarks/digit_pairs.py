"""What does compression cost in test loss? Pairs of digits, every method with the same five seeds.

    python -m benchmarks.digit_pairs            # writes results/digit_pairs.json

Four workers, an unshaped network (the loss does not depend on its speed). Differences to DDP are paired by
seed, because seeds differ more than methods do. Two controls are known to be worse: no communication, and one
bit without error feedback.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._common import arguments_of, write
from benchmarks._places import EXAMPLES
from distcomp.recording import find_runs, read_run

METHODS = (
    "ddp", "bf16", "qsgd:bits=8", "qsgd:bits=4", "qsgd:bits=1", "qsgd:bits=1,error_feedback=False", "none",
)  # fmt: skip
SCRIPT = EXAMPLES / "digits.py"


def final_losses(seed: int, steps: int, methods: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Test loss and accuracy after the last step, by method."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable, "-m", "distcomp", "emulate", "--ranks", "4", "--rate", "unshaped",
            "--methods", ";".join(methods), "-o", f"{directory}/runs",
            str(SCRIPT), "--steps", str(steps), "--seed", str(seed), "--eval-every", str(steps),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        runs = {run.method: run for run in map(read_run, find_runs([Path(directory) / "runs"]))}
        last = {method: runs[method].of_kind("metric")[-1] for method in methods}
        return {method: (one["test_loss"], one["test_accuracy"]) for method, one in last.items()}


def summarize(by_seed: list[dict[str, tuple[float, float]]], methods: tuple[str, ...]) -> dict[str, object]:
    """Mean and spread over seeds, and the differences to DDP seed by seed."""
    rows: dict[str, object] = {}
    for method in methods:
        losses = [seed[method][0] for seed in by_seed]
        differences = [seed[method][0] - seed["ddp"][0] for seed in by_seed]
        rows[method] = {
            "test_loss": losses,
            "mean": statistics.mean(losses),
            "spread": statistics.stdev(losses),
            "test_accuracy_mean": statistics.mean(seed[method][1] for seed in by_seed),
            "paired_difference_mean": statistics.mean(differences),
            "paired_difference_spread": statistics.stdev(differences),
            "relative_to_ddp": statistics.mean(losses) / statistics.mean(seed["ddp"][0] for seed in by_seed),
        }
    return rows


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    by_seed = [final_losses(seed, arguments.steps, METHODS) for seed in range(arguments.seeds)]
    rows = summarize(by_seed, METHODS)
    path = write(
        "digit_pairs", {"ranks": 4, "steps": arguments.steps, "seeds": arguments.seeds, "methods": rows}
    )
    for method, row in rows.items():
        print(f"{method:<36}{json.dumps({k: v for k, v in row.items() if k != 'test_loss'})}")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
