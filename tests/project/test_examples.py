"""The example scripts train, on one worker and on two, and record what the report reads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp import recording

pytest.importorskip("sklearn", reason="scikit-learn is not installed; pip install 'distcomp[examples]'")

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(directory: Path, script: str, *arguments: str, start: tuple[str, ...] = ()) -> recording.Run:
    """Run an example and read its record."""
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", recording.METHOD)
    clean = {name: value for name, value in os.environ.items() if name not in distributed}
    done = subprocess.run(
        [sys.executable, *start, str(EXAMPLES / script), *arguments],
        env={**clean, recording.RUN_DIR: str(directory), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return recording.read_run(directory)


def losses(run: recording.Run) -> dict[int, float]:
    return {record["step"]: record["test_loss"] for record in run.of_kind("metric")}


def test_digits_learns_on_two_workers(tmp_path: Path) -> None:
    run = train(tmp_path, "digits.py", "--steps", "25", "--method", "qsgd:bits=4", start=tuple(TORCHRUN))
    found = losses(run)
    assert list(found) == [10, 20, 25]
    assert found[25] < 2 < math.log(10)
    assert sorted(run.ranks) == [0, 1]
    assert all(step["payload_bytes"] > 0 for step in run.of_kind("step"))


def test_bytes_lm_learns_alone(tmp_path: Path) -> None:
    run = train(tmp_path, "bytes_lm.py", "--steps", "20", "--batch", "4", "--eval-every", "20")
    assert list(losses(run)) == [20]
    assert losses(run)[20] < 4 < math.log(256)
