"""Run a training script with one task per rank through submitit: on Slurm, or on this machine."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import submitit


class Rank:
    """What each task runs: the script, once the variables of a rank are set."""

    def __init__(self, script: str, arguments: list[str]) -> None:
        self.script, self.arguments = script, arguments

    def __call__(self) -> None:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        sys.argv = [self.script, *self.arguments]
        sys.path.insert(0, str(Path(self.script).resolve().parent))
        runpy.run_path(self.script, run_name="__main__")

    def checkpoint(self, *_: object) -> submitit.helpers.DelayedSubmission:
        """On preemption: the same again. The script goes on from its own last checkpoint."""
        return submitit.helpers.DelayedSubmission(self)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks-per-node", type=int, default=1, help="ranks on each")
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--cluster", choices=("slurm", "local"), help="default: Slurm where there is one")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--slurm", action="append", default=[], metavar="NAME=VALUE", help="for sbatch")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main() -> None:
    wanted = options()
    executor = submitit.AutoExecutor(folder=wanted.logs, cluster=wanted.cluster)
    executor.update_parameters(
        nodes=wanted.nodes, tasks_per_node=wanted.tasks_per_node, timeout_min=wanted.minutes,
        **{f"slurm_{name}": value for name, _, value in (one.partition("=") for one in wanted.slurm)},
    )  # fmt: skip
    job = executor.submit(Rank(wanted.script, wanted.arguments))
    print(f"job {job.job_id}, logs in {wanted.logs}", flush=True)
    job.results()
    print(job.stdout() or "", end="")


if __name__ == "__main__":
    main()
