"""The example of reinforcement learning runs: a trainer and two samplers, which hold the trainer's bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "grpo.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]


def run(*arguments: str) -> dict[str, object]:
    clean = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(SCRIPT), "--steps", "6", "--prompts", "4", *arguments],
        env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_samplers_learn_of_the_weights_by_updates_alone():
    sent = run("--key-every", "4")
    whole = run("--weights", "whole")
    assert sent["identical"] is True
    assert sent["reward"] == whole["reward"]
    assert sent["sent_bytes"] < whole["sent_bytes"]
