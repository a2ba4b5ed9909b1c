"""Which ways to real packets does this machine allow? Tests run once for each, or skip and say why."""

from __future__ import annotations

import os
from functools import cache

import pytest

from distcomp.network import support


@cache
def _refusal(rootless: bool) -> str | None:
    if not rootless and os.geteuid() != 0:
        return "root's own way needs root"
    found = support(force_rootless=rootless)
    return "root without its capabilities" if found.rootless and not rootless else found.refusal


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
