"""Structures as their papers write them, in plain NumPy: weights from numbers, and the nearest numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def block_circulant(c: Array, out: int, inputs: int, signs: Array) -> Array:
    """CirCNN: blocks of which each row is the one above, moved by one to the right; cut at the edges."""
    p, q, b, *taps = c.shape
    whole = np.zeros((p * b, q * b, *taps))
    for i in range(p):
        for j in range(q):
            for row in range(b):
                for column in range(b):
                    whole[i * b + row, j * b + column] = c[i, j, (row - column) % b]
    return whole[:out, :inputs] * signs.reshape(1, -1, *[1] * len(taps))


def dct(n: int) -> Array:
    """The orthonormal DCT-II."""
    rows = [[math.cos(math.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)] for k in range(n)]
    scale = np.full((n, 1), math.sqrt(2 / n))
    scale[0] = math.sqrt(1 / n)
    return np.array(rows) * scale


def hashed(w: Array, bucket: NDArray[np.int64], sign: Array, frequencies: bool) -> Array:
    """HashedNets and FreshNets: look up, sign, and transform each kernel back."""
    v = sign * w[bucket]
    if not frequencies:
        return v
    for axis in range(2, v.ndim):
        v = np.moveaxis(np.tensordot(dct(v.shape[axis]).T, v, axes=([1], [axis])), 0, axis)
    return v


def svd(weight: Array, rank: int) -> Array:
    """Eckart and Young: the nearest matrix of a rank."""
    u, s, v = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(weight.shape)


def hosvd(weight: Array, outer: int, inner: int) -> Array:
    """Kim et al.: singular vectors of both channel unfoldings, the core by projection."""
    u = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)[0][:, :outer]
    turned = weight.swapaxes(0, 1)
    v = np.linalg.svd(turned.reshape(len(turned), -1), full_matrices=False)[0][:, :inner]
    core = np.einsum("oi...,op,iq->pq...", weight, u, v)
    return np.einsum("pq...,op,iq->oi...", core, u, v)


def nearest_linear(decode: Callable[[Array], Array], numbers: int, weight: Array) -> Array:
    """The least squares theta of a linear structure, from the columns of its matrix."""
    matrix = np.stack([decode(unit).ravel() for unit in np.eye(numbers)], 1)
    return np.linalg.lstsq(matrix, weight.ravel(), rcond=None)[0]


def evbmf_rank(s: Array, rows: int, columns: int) -> int:
    """Nakajima et al. 2013: the analytic threshold at the noise variance of least free energy, by brute
    force."""
    small, large = min(rows, columns), max(rows, columns)
    alpha = small / large
    tau = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau) * (1 + alpha / tau)
    most = int(min(math.ceil(small / (1 + alpha)) - 1, small)) - 1
    low = max(s[most + 1] ** 2 / (large * x_bar), np.mean(s[most + 1 :] ** 2) / large)
    high = (s**2).sum() / (small * large)
    best, variance = math.inf, low
    for candidate in np.exp(np.linspace(math.log(low), math.log(high), 20_001)):
        x = s**2 / (large * candidate)
        z1, z2 = x[x > x_bar], x[x <= x_bar]
        t = 0.5 * (z1 - (1 + alpha) + np.sqrt((z1 - (1 + alpha)) ** 2 - 4 * alpha))
        energy = (z2 - np.log(z2)).sum() + (z1 - t).sum() + np.log((t + 1) / z1).sum()
        energy += alpha * np.log(t / alpha + 1).sum()
        if energy < best:
            best, variance = energy, candidate
    return int((s > math.sqrt(large * variance * x_bar)).sum())


def forces(weight: Array) -> Array:
    """Wen et al. 2017, L2: pair by pair, then the radial part off."""
    w = weight.reshape(len(weight), -1)
    lengths = np.linalg.norm(w, axis=1)
    u = w / lengths[:, None]
    out = np.zeros_like(w)
    for i in range(len(w)):
        f = sum((u[j] - u[i] for j in range(len(w))), np.zeros(w.shape[1]))
        out[i] = lengths[i] * (f - (f @ u[i]) * u[i])
    return out.reshape(weight.shape)


def mixture(weights: Array, means: Array, sigmas: Array, shares: Array) -> float:
    """The negative log-likelihood of a mixture of Gaussians, weight by weight."""
    total = 0.0
    for w in weights.ravel():
        density = sum(
            share / (sigma * math.sqrt(2 * math.pi)) * math.exp(-((w - mean) ** 2) / (2 * sigma**2))
            for mean, sigma, share in zip(means, sigmas, shares, strict=True)
        )
        total -= math.log(density)
    return total


def off_diagonal(weight: Array, outputs: Array, inputs: Array) -> float:
    """SplitNet's group lasso, group by group, column by column, row by row."""
    total = 0.0
    for p_out, p_in in zip(outputs, inputs, strict=True):
        outwards = (1 - p_out)[:, None] * weight * p_in[None]
        inwards = p_out[:, None] * weight * (1 - p_in)[None]
        total += sum(np.linalg.norm(outwards[:, i]) for i in range(weight.shape[1]))
        total += sum(np.linalg.norm(inwards[o]) for o in range(weight.shape[0]))
    return total
