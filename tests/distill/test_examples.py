"""Each family's script trains two workers under ``distcomp emulate``, and says what it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp import recording

pytest.importorskip("sklearn", reason="scikit-learn is not installed; pip install 'distcomp[examples]'")

ROOT = Path(__file__).parents[2]


def distcomp(*arguments: str, where: Path) -> str:
    """What a command printed."""
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", recording.METHOD)
    clean = {name: value for name, value in os.environ.items() if name not in distributed}
    done = subprocess.run(
        [sys.executable, "-m", "distcomp", *arguments],
        cwd=where,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "method", "told"),
    [
        ("distill.py --teacher-steps 40 --loss hint", "qsgd:bits=4", r"training sends 2\.\d+ times as much"),
        ("online.py --networks one", "qsgd:bits=4", r"sends 1\.75 times what training the kept ones"),
        ("apprentice.py --scheme A", "qsgd:bits=4", r"sends 5\.88 times what training the kept ones"),
        ("codistill.py", "codistill:period=10", r"one small network of what all predict"),
    ],
    ids=["losses", "online", "apprentice", "codistillation"],
)
def test_it_trains_on_an_emulated_network(script: str, method: str, told: str, tmp_path: Path) -> None:
    name, *arguments = script.split()
    distcomp(
        "emulate", "--no-packets", "--ranks", "2", "--method", method, "-o", "out",
        str(ROOT / "examples" / name), "--steps", "30", *arguments, where=tmp_path,
    )  # fmt: skip
    (directory,) = recording.find_runs([tmp_path / "out"])
    run = recording.read_run(directory)
    (last,) = [record for record in run.of_kind("metric") if record["step"] == 30]
    assert last["test_loss"] < 2.5
    assert sorted(run.ranks) == [0, 1]
    sent_bytes = sum(step["payload_bytes"] for step in run.of_kind("step"))
    assert sent_bytes > 0
    said = (directory / "output0.txt").read_text()
    assert re.search(told, said), said


def test_codistillation_is_simulated_and_reported(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "codistill.py")
    settings = ["--workers", "3", "--rate", "1mbit", "--delay", "50ms", "--steps", "20", "--eval-every", "10"]
    distcomp("simulate", *settings, "--method", "codistill:period=10", "-o", "out", script, where=tmp_path)
    distcomp("report", "out", "-o", "report.html", where=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "codistill:period=10" in page
    run = recording.read_run(tmp_path / "out")
    assert [record["step"] for record in run.of_kind("metric")][-1] == 20
