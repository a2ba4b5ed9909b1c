"""Which ways to real packets does this machine allow? Tests that need them run once for each, or skip and say why."""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from distcomp.network import support


@cache
def _refusal(rootless: bool) -> str | None:
    if not rootless and os.geteuid() != 0:
        return "root's own way needs root"
    found = support(force_rootless=rootless)
    return found.refusal if found.refusal or found.rootless == rootless else "root without its capabilities"


@pytest.fixture(params=[False, True], ids=["root", "rootless"])
def rootless(request: pytest.FixtureRequest) -> bool:
    """Both ways to real packets, one after the other."""
    way: bool = request.param
    if refusal := _refusal(way):
        pytest.skip(refusal)
    return way


@pytest.fixture
def any_way() -> bool:
    """One way to real packets, whichever there is."""
    for way in (True, False):
        if not _refusal(way):
            return way
    pytest.skip(str(_refusal(True)))


def living(pids: Iterable[int]) -> list[int]:
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
