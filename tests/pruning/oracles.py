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


def correlations(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """|Pearson's r| between each output ``[N, K]`` and each input ``[N, I]`` over the examples."""
    return np.array([[abs(np.corrcoef(a, b)[0, 1]) for a in inputs.T] for b in outputs.T])


def conv_correlations(x: np.ndarray, y: np.ndarray, kernel: int) -> np.ndarray:
    """Of an unpadded convolution: at each place of the output by itself, then the mean over the places."""
    (_, channels, *_), (_, filters, height, width) = x.shape, y.shape
    found = np.zeros((filters, channels, kernel, kernel))
    for f, c, i, j in np.ndindex(found.shape):
        found[f, c, i, j] = np.mean(
            [
                abs(np.corrcoef(x[:, c, p + i, q + j], y[:, f, p, q])[0, 1])
                for p in range(height)
                for q in range(width)
            ]
        )
    return found


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def discriminating(
    x: np.ndarray, y: np.ndarray, first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...],
    balance: float, keep: int,
) -> list[int]:  # fmt: skip
    """Zhuang's selection of inputs of ``first`` in a net of two linear layers with nothing in between."""
    (w, b), (v, c) = first, second
    whole, one_hot = x @ w.T + b, np.eye(len(c))[y]
    chosen: list[int] = []
    while len(chosen) < keep:
        masked = np.zeros_like(w)
        masked[:, chosen] = w[:, chosen]
        z = x @ masked.T + b
        dz = (softmax(z @ v.T + c) - one_hot) / len(x) @ v + balance * 2 * (z - whole) / z.size
        scores = np.abs(dz.T @ x).sum(0)
        scores[chosen] = -np.inf
        chosen.append(int(scores.argmax()))
    return sorted(chosen)
