"""The example trains on two workers, drops blocks, and records what the report reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp import recording

pytest.importorskip("sklearn", reason="scikit-learn is not installed; pip install 'distcomp[examples]'")

SCRIPT = Path(__file__).parents[2] / "examples" / "stochastic_depth.py"


def test_the_example_trains(tmp_path: Path) -> None:
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", recording.METHOD)
    clean = {name: value for name, value in os.environ.items() if name not in distributed}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(SCRIPT),
    ]
    done = subprocess.run(
        [*command, "--steps", "20", "--width", "64", "--method", "qsgd:bits=4"],
        env={**clean, recording.RUN_DIR: str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of the blocks ran" in done.stdout
    run = recording.read_run(tmp_path)
    (measured,) = run.of_kind("metric")
    assert measured["test_loss"] < 2.5
    sent = {step["payload_bytes"] for step in run.of_kind("step")}
    assert len(sent) > 3  # other blocks in other steps
