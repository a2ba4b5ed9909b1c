"""What the papers say, in NumPy; written without a look at the implementation."""

from __future__ import annotations

import math

import numpy as np


def largest(values: np.ndarray, count: int, among: np.ndarray | None = None) -> np.ndarray:
    """The mask of the ``count`` largest; ties go to the lower index."""
    flat, allowed = values.ravel(), np.ones(values.size, bool) if among is None else among.ravel()
    candidates = [i for i in range(flat.size) if allowed[i]]
    chosen = sorted(candidates, key=lambda i: (-flat[i], i))[:count]
    mask = np.zeros(flat.size, bool)
    mask[chosen] = True
    return mask.reshape(values.shape)


def cubic(step: int, begin: int, end: int, target: float) -> float:
    if step >= end:
        return target
    return target + (0.0 - target) * (1 - (step - begin) / (end - begin)) ** 3


def surgery(weight: np.ndarray, mask: np.ndarray, rate: float, base_from: np.ndarray) -> np.ndarray:
    """Guo's Eq. (3): thresholds from the weights at the first operation."""
    magnitudes = np.abs(base_from)
    base = max(magnitudes.mean() + rate * magnitudes.std(), 0.0)
    new = mask.copy()
    for index in np.ndindex(weight.shape):
        if abs(weight[index]) <= 0.9 * base:
            new[index] = False
        elif abs(weight[index]) > 1.1 * base:
            new[index] = True
    return new


def rigged(
    weight: np.ndarray, mask: np.ndarray, gradient: np.ndarray, fraction: float, step: int, until: int
) -> np.ndarray:
    """Evci's drop and grow of one layer."""
    count = int(fraction / 2 * (1 + math.cos(math.pi * step / until)) * mask.sum())
    kept = largest(np.abs(weight), int(mask.sum()) - count, mask)
    return kept | largest(np.abs(gradient), count, ~kept)


def n_of_m(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    rows = np.abs(weight).reshape(-1, m)
    return np.stack([largest(row, n) for row in rows]).reshape(weight.shape)


def block_shrunk(group: np.ndarray, threshold: float) -> np.ndarray:
    """The proximal operator of threshold * L2 norm."""
    norm = math.sqrt(float((group.astype(np.float64) ** 2).sum()))
    return np.zeros_like(group) if norm <= threshold else group * (1 - threshold / norm)


def soft(values: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(values) * np.maximum(np.abs(values) - threshold, 0)


def dct_matrix(n: int) -> np.ndarray:
    """The orthonormal DCT-II, from its definition."""
    rows = []
    for k in range(n):
        scale = math.sqrt((1 if k == 0 else 2) / n)
        rows.append([scale * math.cos(math.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)])
    return np.array(rows)
