"""The example trains networks of two widths on two workers, and makes one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp import recording

pytest.importorskip("sklearn", reason="scikit-learn is not installed; pip install 'distcomp[examples]'")

SCRIPT = Path(__file__).parents[2] / "examples" / "codistill.py"


def test_the_example_codistills_and_makes_one_network_of_all(tmp_path: Path) -> None:
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", recording.METHOD)
    clean = {name: value for name, value in os.environ.items() if name not in distributed}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), "--steps", "120", "--eval-every", "60"],
        env={**clean, recording.RUN_DIR: str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = recording.read_run(tmp_path)
    losses = {record["step"]: record["test_loss"] for record in run.of_kind("metric")}
    assert losses[120] < losses[60] < 2.3
    assert re.search(
        r"each worker sent 40,\d\d\d bytes in 120 steps", done.stdout
    )  # 2 x 2,000 x 10 in 8 bits
    (accuracy,) = re.findall(r"without labels: accuracy (\d+\.\d)%", done.stdout)
    assert float(accuracy) > 25
