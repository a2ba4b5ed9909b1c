"""my_method in plain NumPy: the equations of its source and nothing of its implementation.

Write it from the paper, by somebody who has not seen the other file if you can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]


def contribution(x: Vector, grid: float) -> Vector:
    """What one rank adds to the sum."""
    return np.rint(x.astype(np.float64) / grid) * grid


def estimate(xs: Sequence[Vector], grid: float) -> Vector:
    """The mean that all ranks agree on; ``xs``: one vector of each rank."""
    return np.mean([contribution(x, grid) for x in xs], axis=0)


def steps(xs: Sequence[Vector], grid: float, count: int) -> list[Vector]:
    """The estimates of ``count`` steps on the same ``xs`` with error feedback: what was not sent is owed."""
    owed = [np.zeros_like(x, dtype=np.float64) for x in xs]
    estimates = []
    for _ in range(count):
        given = [x + rest for x, rest in zip(xs, owed, strict=True)]
        estimates.append(estimate(given, grid))
        owed = [x - contribution(x, grid) for x in given]
    return estimates
