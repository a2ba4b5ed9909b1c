"""The papers' quantizers in plain NumPy, one number at a time, written without looking at the package."""

from __future__ import annotations

import itertools
import math

import numpy as np


def fixed(x: float, integer: int, fraction: int, u: float | None = None) -> float:
    """Gupta 2015, section 3: <IL, FL> with saturation; to the nearest, ties to even, or by ``u``."""
    spacing, top = 2.0**-fraction, 2.0 ** (integer - 1)
    if u is None:
        k = float(np.round(x / spacing))
    else:
        below = math.floor(x / spacing)
        k = below + (1 if x / spacing - below >= 1 - u else 0)
    return min(max(k * spacing, -top), top - spacing)


def unit(x: float, bits: int) -> float:
    """DoReFa, equation 5."""
    return float(np.round((2**bits - 1) * x)) / (2**bits - 1)


def dorefa_weight(w: np.ndarray, bits: int) -> np.ndarray:
    if bits == 1:
        return np.where(w >= 0, 1.0, -1.0) * np.abs(w).mean()
    t = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
    return 2 * np.vectorize(lambda one: unit(one, bits))(t) - 1


def dorefa_gradient(dr: np.ndarray, bits: int, u: np.ndarray) -> np.ndarray:
    """DoReFa, equation 12, sample by sample."""
    out = np.zeros_like(dr)
    for sample in range(len(dr)):
        m = np.abs(dr[sample]).max()
        if m == 0:
            continue
        for place in np.ndindex(dr[sample].shape):
            at = (sample, *place)
            x = dr[at] / (2 * m) + 0.5 + (u[at] - 0.5) / (2**bits - 1)
            out[at] = 2 * m * (unit(min(max(x, 0), 1), bits) - 0.5)
    return out


def xnor_conv(x: np.ndarray, w: np.ndarray, bias: np.ndarray, padding: int) -> np.ndarray:
    """XNOR-Net, equation 11: (sign(I) * sign(W)) K alpha + bias, by loops; zero padding of both."""
    n, _, height, width = x.shape
    filters, _, kh, kw = w.shape
    signs = np.pad(np.where(x >= 0, 1.0, -1.0), [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    mean = np.pad(np.abs(x).mean(1), [(0, 0), (padding, padding), (padding, padding)])
    out = np.zeros((n, filters, height + 2 * padding - kh + 1, width + 2 * padding - kw + 1))
    for b, f, i, j in np.ndindex(out.shape):
        alpha = np.abs(w[f]).mean()
        k = mean[b, i : i + kh, j : j + kw].sum() / (kh * kw)
        product = (signs[b, :, i : i + kh, j : j + kw] * np.where(w[f] >= 0, 1.0, -1.0)).sum()
        out[b, f, i, j] = product * k * alpha + bias[f]
    return out


def power_of_two(x: float, u: float) -> float:
    """Lin 2016, section 3: one of the powers of two around |x|, the upper with chance |x| / 2^k - 1."""
    if x == 0:
        return 0.0
    k = math.floor(math.log2(abs(x)))
    up = abs(x) / 2.0**k - 1 >= 1 - u
    return math.copysign(2.0 ** (k + up), x)


def entropy(magnitudes: np.ndarray, cut: list[int]) -> float:
    """Park 2017, equation 4: -sum I_n P_n log P_n."""
    total = 0.0
    for low, high in itertools.pairwise(cut):
        if high > low:
            p = (high - low) / len(magnitudes)
            total -= (magnitudes[low:high] ** 2).mean() * p * math.log(p)
    return total


def park_boundaries(magnitudes: np.ndarray, clusters: int) -> list[int]:
    """Park 2017, algorithm 1: from equal counts, move one boundary at a time to the best place."""
    n = len(magnitudes)
    cut = [n * k // clusters for k in range(clusters + 1)]
    for _ in range(20):
        before = list(cut)
        for k in range(1, clusters):
            tried = [(*cut[:k], place, *cut[k + 1 :]) for place in range(cut[k - 1], cut[k + 1] + 1)]
            values = [entropy(magnitudes, list(one)) for one in tried]
            best = max(values)
            cut[k] = next(
                one[k] for one, value in zip(tried, values, strict=True) if value >= best * (1 - 1e-12)
            )
        if cut == before:
            break
    return cut
