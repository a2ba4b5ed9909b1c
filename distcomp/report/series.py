"""Points of curves: thinned for the page, and averaged over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Points = tuple[tuple[float, float], ...]
MOST = 300
"""Points of a line at most: more than a screen can show, few enough for many lines on a page."""


def thinned(points: Points, most: int = MOST) -> Points:
    """``most`` of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    last = len(points) - 1
    return tuple(points[round(at * last / (most - 1))] for at in range(most))


def averaged(runs: Sequence[Points], log: bool = False) -> tuple[tuple[float, float, float], ...]:
    """(x, mean, sample standard deviation) of several curves over what all of them cover.

    At their own x where these are the same, else on a grid (a geometric one with ``log``), between the points
    of each curve on a straight line. Empty where they have no common range.
    """
    if len(runs) < 2 or any(not run for run in runs):
        return ()
    abscissae = {tuple(x for x, _ in run) for run in runs}
    if len(abscissae) == 1:
        xs = [x for x, _ in thinned(runs[0])]
    else:
        low, high = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
        if not low < high:
            return ()
        xs = _grid(low, high, min(MOST, max(len(run) for run in runs)), log and low > 0)
    rows = [[interpolated(run, x) for run in runs] for x in xs]
    return tuple((x, statistics.fmean(row), statistics.stdev(row)) for x, row in zip(xs, rows, strict=True))


def interpolated(points: Points, x: float) -> float:
    """The value at ``x`` on the straight lines between points, which rise in x."""
    low, high = 0, len(points) - 1
    if x <= points[0][0]:
        return points[0][1]
    if x >= points[-1][0]:
        return points[-1][1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if points[middle][0] <= x else (low, middle)
    (x0, y0), (x1, y1) = points[low], points[high]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1


def _grid(low: float, high: float, count: int, log: bool) -> list[float]:
    count = max(count, 2)
    if log:
        return [low * (high / low) ** (at / (count - 1)) for at in range(count - 1)] + [high]
    return [low + (high - low) * at / (count - 1) for at in range(count - 1)] + [high]


def norm(values: Sequence[float | None]) -> float | None:
    """The root of the sum of squares, where all are known."""
    known = [value for value in values if value is not None]
    return math.hypot(*known) if known and len(known) == len(values) else None
