"""The elastic example: what torchrun starts anew goes on from the last checkpoint that is whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.launchers.test_matrix import ROOT, TORCHRUN, clean


def steps(folder: Path, until: int, method: str, *start: str) -> list[tuple[int, int]]:
    """Train up to a step; (step, workers) as they are printed."""
    script = [str(ROOT / "examples" / "elastic.py"), "--checkpoints", str(folder), "--width", "32"]
    done = subprocess.run(
        [sys.executable, *start, *script, "--method", method, "--every", "2", "--steps", str(until)],
        env=clean(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [(int(a), int(b)) for a, b in re.findall(r"step (\d+) workers (\d+)", done.stdout)]


def test_it_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    together = [*TORCHRUN[1:], "--standalone"]
    assert steps(tmp_path, 3, "qsgd:bits=1", *together) == [(1, 2), (2, 2), (3, 2)]
    (tmp_path / "step-000003").rename(tmp_path / "unfinished-000003-of-2")  # its writers died just before
    assert steps(tmp_path, 4, "qsgd:bits=1") == [(3, 1), (4, 1)]


def test_a_worker_joins_gossip(tmp_path: Path) -> None:
    assert steps(tmp_path, 2, "choco") == [(1, 1), (2, 1)]
    assert steps(tmp_path, 4, "choco", *TORCHRUN[1:], "--standalone") == [(3, 2), (4, 2)]
