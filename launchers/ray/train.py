"""Run a script on the workers of Ray Train: ``python train.py --workers 4 SCRIPT --its-options``."""

import argparse
import runpy
import sys
from pathlib import Path

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--workers", type=int, default=2, help="how many")
    parser.add_argument("--gpu", action="store_true", help="one for each, over NCCL instead of Gloo")
    parser.add_argument("script", type=Path, help="the training script, on a path that every worker has")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    wanted = parser.parse_args()
    script = str(wanted.script.resolve())

    def work():
        sys.argv = [script, *wanted.arguments]
        runpy.run_path(script, run_name="__main__")

    TorchTrainer(
        work,
        torch_config=TorchConfig(backend="nccl" if wanted.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=wanted.workers, use_gpu=wanted.gpu),
    ).fit()


if __name__ == "__main__":
    main()
