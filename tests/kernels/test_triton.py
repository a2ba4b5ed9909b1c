"""Triton against the reference: here where there is a GPU, otherwise in a process of its own.

Triton's interpreter must be asked for before anything imports Triton, and torch may already have.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton): no GPU kernels")
OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)

if torch.cuda.is_available():
    from tests.kernels.equality import *  # noqa: F403  (its tests become this file's)
else:

    @pytest.mark.skipif(OLD, reason="this interpreter lets NaN through minimum(), unlike the compiler")
    def test_in_the_interpreter() -> None:
        tests = Path(__file__).parent / "equality.py"
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
