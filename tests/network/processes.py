"""Is a process alive, and has it ended yet? Asked of the kernel, without polling a clock."""

from __future__ import annotations

import os
import selectors
import sys
from collections.abc import Iterable
from pathlib import Path

import distcomp.errors


def active(pids: Iterable[int]) -> list[int]:
    """Those of the processes that still run; the dead whom nobody has mourned do not count."""
    alive = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        alive += [] if state in "ZX" else [pid]
    return alive


def wait_for_death(pids: Iterable[int], patience_s: float = 30.0) -> None:
    """Return once all these processes have ended; fail the test when they do not."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            ended = selector.select(patience_s)
        os.close(handle)
        assert ended, f"process {pid} is still there"


def light_python(program: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The argv of a program that may use distcomp.network, in a Python that has not imported torch for it."""
    package = str(Path(distcomp.errors.__file__).parent)
    stub = "package = types.ModuleType('distcomp')"
    prelude = (
        f"import sys, types; {stub}; package.__path__ = [{package!r}]; sys.modules['distcomp'] = package\n"
    )
    return [python, "-P", "-c", prelude + program, *arguments]
