"""A rising curve through measurements of which some are grossly wrong: robust isotonic regression.

Message times on a shared machine rise with the message's size, but a scheduler that looks away for 10 ms
makes any of them ten times too long. Least squares follows such outliers; a bounded loss does not, and is not
convex. This module finds its global optimum on a grid all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distcomp.errors import DistcompError

Floats = NDArray[np.float64]
LossOfPoints = Callable[[Floats], Floats]
"""Of a residual in units of the noise; even, and never falling away from zero."""

TUKEY_C, HUBER_C = 4.685, 1.345
"""95 % efficiency under Gaussian noise."""

MAD_TO_SIGMA = 1.4826
OF_FIVE = 0.878
"""A Gaussian value against the median of four others: the variances of both add up to 1.298."""


def tukey(residual: Floats) -> Floats:
    """``c^2/6 (1 - (1 - (r/c)^2)^3)`` up to ``c``, constant beyond: an outlier costs the same however far it
    lies."""
    inside = np.clip(1 - (residual / TUKEY_C) ** 2, 0, None)
    return np.asarray(TUKEY_C**2 / 6 * (1 - inside**3))


def huber(residual: Floats) -> Floats:
    """``r^2/2`` up to ``c``, then linear."""
    size = np.abs(residual)
    return np.where(size <= HUBER_C, size**2 / 2, HUBER_C * (size - HUBER_C / 2))


def squares(residual: Floats) -> Floats:
    """``r^2/2``: least squares, for comparison."""
    return np.asarray(residual**2 / 2)


def isotonic_fit(
    y: ArrayLike, loss: LossOfPoints = tukey, sigma: float | None = None, levels: int = 12
) -> NDArray[np.float64]:
    """The rising sequence ``x_1 <= ... <= x_n`` that minimizes ``sum_ik loss((x_i - y_ik) / sigma)``.

    ``y`` is ``[n]``, or ``[n, repeats]`` where each was measured several times: that the last value is an
    outlier only its repetitions can tell. ``x_i`` lies on a grid of ``2^levels`` points from the least to the
    largest ``y``; on that grid the optimum is global. ``sigma`` is the noise; None estimates it
    (:func:`noise`). Returns float64, ``[n]``.

    Coarse to fine: the values of each ``x_i`` are cut into intervals, whose lower bounds make a chain that
    dynamic programming solves; an interval through which no path is as good as a solution already found is
    pruned, the others are halved. ``O(n 2^levels)`` at worst, near ``O(n levels)`` on real data.

    Source: Lim, "An efficient pruning algorithm for robust isotonic regression", NeurIPS 2018. We differ: the
    finest intervals are points of a grid, so the optimum is one of a grid, too.

    Raises DistcompError for values that are not finite, or of which there are none.
    """
    y = np.asarray(y, dtype=np.float64)
    if y.ndim not in (1, 2) or not y.size or not np.isfinite(y).all():
        raise DistcompError("a curve is fitted to finite numbers, one or more; leave out what is missing")
    y = y.reshape(len(y), -1)
    low, span = float(y.min()), float(np.ptp(y))
    if span == 0:
        return np.full(len(y), low)
    scale = (noise(y) if sigma is None else sigma) or span / 2**levels
    problem = _Problem(y, loss, scale, low, span / (2**levels - 1))
    active = [np.zeros(1, dtype=np.int64)] * len(y)
    for level in range(levels, -1, -1):
        active = [problem.split(intervals) if level < levels else intervals for intervals in active]
        active = problem.prune(active, 2**level)
    return low + problem.step * problem.best.astype(np.float64)


def noise(y: Floats) -> float:
    """The standard deviation of the noise on ``y``, ``[n, repeats]``: the median distance of a value from the
    median of its repetitions; where there is one only, from that of its four neighbours, which a rise hardly
    moves."""
    if y.shape[1] > 1:
        distance = np.abs(y - np.median(y, axis=1, keepdims=True))
        return float(MAD_TO_SIGMA * np.median(distance))
    values = y[:, 0]
    if len(values) < 5:
        return float(np.ptp(values))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(values, 2, mode="reflect"), 5)
    distance = np.abs(values - np.median(around[:, [0, 1, 3, 4]], axis=1))
    return float(MAD_TO_SIGMA * OF_FIVE * np.median(distance))


class _Problem:
    """The data, the grid, and the best rising path over it that is known so far."""

    def __init__(self, y: Floats, loss: LossOfPoints, sigma: float, low: float, step: float) -> None:
        self.y, self.loss, self.sigma, self.low, self.step = y, loss, sigma, low, step
        self.best: NDArray[np.int64] = np.zeros(len(y), dtype=np.int64)
        self.upper = self.cost(self.best)

    def cost(self, points: NDArray[np.int64]) -> float:
        """Of a path, given as indices into the grid."""
        return float(self.loss((self.low + self.step * points[:, None] - self.y) / self.sigma).sum())

    def split(self, intervals: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([2 * intervals, 2 * intervals + 1], axis=1).reshape(-1)

    def prune(self, active: list[NDArray[np.int64]], width: int) -> list[NDArray[np.int64]]:
        """Drop the intervals of ``width`` grid points through which every path costs more than the best one
        known."""
        bounds = [self._lower(i, intervals, width) for i, intervals in enumerate(active)]
        ahead = _sweep(active, bounds)
        behind = [intervals[::-1] for intervals in _sweep([-intervals[::-1] for intervals in active[::-1]],
                                              [lower[::-1] for lower in bounds[::-1]])][::-1]  # fmt: skip
        self._improve(active, ahead, bounds, width)
        room = self.upper + 1e-9 * (1 + abs(self.upper))
        return [
            intervals[a + b - own <= room]
            for intervals, a, b, own in zip(active, ahead, behind, bounds, strict=True)
        ]

    def _lower(self, i: int, intervals: NDArray[np.int64], width: int) -> Floats:
        """No point of an interval costs less: each datum is taken at the point nearest to it."""
        first = (self.low + self.step * (intervals * width))[:, None]
        last = first + self.step * (width - 1)
        losses = self.loss((np.clip(self.y[i], first, last) - self.y[i]) / self.sigma)
        return np.asarray(losses.sum(axis=1))

    def _improve(
        self, active: list[NDArray[np.int64]], ahead: list[Floats], bounds: list[Floats], width: int
    ) -> None:
        """Follow the cheapest path of intervals backwards; the rising points next to the data in it may be a
        better solution."""
        n = len(self.y)
        chosen = np.empty(n, dtype=np.int64)
        limit = np.iinfo(np.int64).max
        for i in range(n - 1, -1, -1):
            allowed = np.flatnonzero(active[i] <= limit)
            limit = int(active[i][allowed[np.argmin(ahead[i][allowed])]])
            chosen[i] = limit
        nearest = np.rint((np.median(self.y, axis=1) - self.low) / self.step).astype(np.int64)
        points = np.maximum.accumulate(np.clip(nearest, chosen * width, chosen * width + width - 1))
        cost = self.cost(points)
        if cost < self.upper:
            self.best, self.upper = points, cost


def _sweep(active: list[NDArray[np.int64]], bounds: list[Floats]) -> list[Floats]:
    """The cost of the cheapest rising path that ends in each interval; ``active`` are rising indices."""
    costs = [bounds[0]]
    for i in range(1, len(active)):
        cheapest = np.minimum.accumulate(costs[-1])
        last_below = np.searchsorted(active[i - 1], active[i], side="right") - 1
        before = np.where(last_below >= 0, cheapest[np.maximum(last_below, 0)], np.inf)
        costs.append(before + bounds[i])
    return costs
