"""One-dimensional k-means: the few values that many weights share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
MOST_ROUNDS = 10_000
"""Of k-means, which ends much sooner: when no centroid moves. A round is a few binary searches."""


def shared_values(values: Values, most: int) -> tuple[Values, NDArray[np.int64]]:
    """At most ``most`` centroids, rising, and the index of each value's centroid.

    Exact where there are no more different values than that; otherwise :func:`k_means`.
    """
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) <= most:
        return distinct.astype(np.float32), codes.reshape(-1).astype(np.int64)
    centroids = k_means(values, most)
    codes = nearest(values, centroids)
    used, codes = np.unique(codes, return_inverse=True)
    return centroids[used], codes.reshape(-1).astype(np.int64)


def k_means(values: Values, count: int) -> Values:
    """Lloyd's iteration in one dimension from equally spaced centroids between the extremes ("linear"),
    until none of them moves.

    No centroid is zero: a shared weight lives. Source: Han et al. 2016, who found this start best.
    """
    ordered = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], count)
    for _ in range(MOST_ROUNDS):
        bounds = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
        ends = np.concatenate([[0], bounds, [len(ordered)]])
        sizes = np.diff(ends)
        means = (sums[ends[1:]] - sums[ends[:-1]]) / np.maximum(sizes, 1)
        moved = np.where(sizes > 0, means, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    distinct = np.unique(centroids.astype(np.float32))
    active: Values = distinct[distinct != 0]
    return active


def nearest(values: Values, centroids: Values) -> NDArray[np.int64]:
    """The index of the nearest centroid (rising); the lower of two."""
    bounds = (centroids[1:].astype(np.float64) + centroids[:-1]) / 2
    return np.searchsorted(bounds, values.astype(np.float64), side="left").astype(np.int64)
