"""CNNpack: convolution kernels as a few common ones and sparse, rounded remainders, in the frequency
domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError

_Floats = NDArray[np.float32]
_Numbers = NDArray[np.int64]
ROUNDS = 30
"""Of k-means over kernels."""
LONGEST_SIDE = 256
"""Of a kernel: its transform is a matrix of the square of it, which no limit of a file's tensors bounds."""


@dataclass(frozen=True)
class DctPack:
    """How kernels are packed: see :func:`distcomp.files.container.compress`.

    ``clusters`` common kernels of each layer (0: none). What remains of a coefficient is made smaller by
    ``threshold`` standard deviations of the layer's coefficients, zero if it was smaller (soft threshold),
    and rounded to ``levels`` equally spaced values.

    Source: Wang et al., CNNpack: packing convolutional neural networks in the frequency domain, NIPS 2016.
    """

    clusters: int = 16
    threshold: float = 0.5
    levels: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.clusters <= 4096 or self.threshold < 0 or not 2 <= self.levels <= 4096:
            raise DistcompError(
                f"a pack has 0 to 4096 clusters, a threshold of 0 or more and 2 to 4096 levels, not "
                f"{self.clusters}, {self.threshold}, {self.levels}"
            )


def basis(size: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II, ``[size, size]``."""
    k, i = np.arange(size)[:, None], np.arange(size)[None]
    rows: NDArray[np.float64] = np.cos(np.pi * (2 * i + 1) * k / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


def is_kernel(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has planes of more than one tap, and of a side whose transform is small."""
    return len(shape) == 4 and shape[2] * shape[3] > 1 and max(shape[2:]) <= LONGEST_SIDE


def coefficients(weight: _Floats) -> NDArray[np.float64]:
    """``[kernels, taps]`` of a weight ``[out, in, h, w]``."""
    rows, columns = basis(weight.shape[2]), basis(weight.shape[3])
    turned: NDArray[np.float64] = rows @ weight.astype(np.float64) @ columns.T
    return turned.reshape(-1, weight.shape[2] * weight.shape[3])


def weights(turned: NDArray[np.float64], shape: tuple[int, ...]) -> _Floats:
    """The weight of its coefficients."""
    rows, columns = basis(shape[2]), basis(shape[3])
    return (rows.T @ turned.reshape(shape) @ columns).astype(np.float32)


def packed(weight: _Floats, how: DctPack) -> tuple[_Floats, _Numbers, _Floats]:
    """Common kernels ``[clusters, taps]``, which of them each kernel has, and remainders ``[kernels, taps]``,
    sparse and of few values."""
    turned = coefficients(weight)
    clusters = min(how.clusters, len(turned) // 8)
    centres, members = common_kernels(turned, clusters)
    rest = turned - centres.astype(np.float64)[members] if clusters else turned
    bound = how.threshold * float(turned.std())
    shrunk = np.sign(rest) * np.maximum(np.abs(rest) - bound, 0)
    return centres, members, rounded(shrunk, how.levels)


def rounded(values: NDArray[np.float64], levels: int) -> _Floats:
    """To multiples of the largest magnitude over ``levels // 2``."""
    step = float(np.abs(values).max(initial=0.0)) / (levels // 2)
    return (np.round(values / step) * step if step else values).astype(np.float32)


def common_kernels(turned: NDArray[np.float64], clusters: int) -> tuple[_Floats, _Numbers]:
    """k-means over kernels, from kernels equally spaced in the order of their length: the same everywhere."""
    if not clusters:
        return np.zeros((0, turned.shape[1]), np.float32), np.zeros(len(turned), np.int64)
    order = np.argsort(np.linalg.norm(turned, axis=1), kind="stable")
    centres = turned[order[np.linspace(0, len(turned) - 1, clusters).astype(np.int64)]].copy()
    members = np.zeros(len(turned), np.int64)
    for _ in range(ROUNDS):
        distances = (centres**2).sum(1)[None] - 2 * turned @ centres.T
        members = distances.argmin(1)
        sizes = np.bincount(members, minlength=clusters)
        sums = np.zeros_like(centres)
        np.add.at(sums, members, turned)
        moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres.astype(np.float32), members
