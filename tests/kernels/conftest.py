"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def instruction_sets() -> Iterator[list[str]]:
    """Those that this processor has; afterwards the usual one again."""
    from distcomp.kernels import _cpu

    usual, found = _cpu.instruction_set(), []
    for name in ("generic", "avx2", "avx512"):
        try:
            _cpu.use(name)
        except ValueError:
            continue
        found.append(name)
    _cpu.use(usual)
    yield found
    _cpu.use(usual)
