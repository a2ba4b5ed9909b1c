"""What public implementations compute, in plain NumPy and words of ours: the arithmetic alone, without
packing, devices or networks.

GRACE is github.com/sands-lab/grace (its ``dist`` package), CGX is github.com/IST-DASLab/torch_cgx, CHOCO-SGD
is github.com/epfml/ChocoSGD. Random numbers are arguments: uniform in [0, 1), one for each element.
"""

from __future__ import annotations

import numpy as np

F = np.float32


def grace_qsgd(x: np.ndarray, u: np.ndarray, levels: int, bucket: int) -> np.ndarray:
    """``QSGDCompressor``: Euclidean norms of buckets; up where ``u`` is below the fraction."""
    out = np.zeros_like(x)
    for at in range(0, len(x), bucket):
        v = x[at : at + bucket]
        norm = np.sqrt(np.square(v.astype(np.float64)).sum())
        exact = levels / norm * np.abs(v)
        level = np.floor(exact) + (u[at : at + bucket] < exact - np.floor(exact))
        out[at : at + bucket] = norm / levels * level * np.sign(v)
    return out


def grace_terngrad(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """``TernGradCompressor``: clipped at 2.5 deviations; its sign times the largest, where ``u`` of that is
    less than it."""
    limit = 2.5 * x.astype(np.float64).std()
    g = np.clip(x, -limit, limit)
    largest = np.abs(g).max()
    return np.where(u * largest >= np.abs(g), 0.0, np.sign(g)) * largest


def grace_natural(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """``NaturalCompressor``: the exponent in 8 bits beside the sign, which holds -110 to 17."""
    out = np.zeros(len(x))
    for i, value in enumerate(x.astype(np.float64)):
        if value == 0:
            code = -128
        else:
            low, high = np.floor(np.log2(abs(value))), np.ceil(np.log2(abs(value)))
            down = (2.0**high - abs(value)) / 2.0**low
            exponent = low + (u[i] < 1 - down)
            code = np.clip(exponent, -110, 17) - 18 + (127 if value < 0 else 0)
        out[i] = -(2.0 ** (code - 127 + 18)) if code >= 0 else 2.0 ** (code + 18)
    return out


def grace_sign(x: np.ndarray) -> np.ndarray:
    """``EFSignSGDCompressor``: the mean magnitude of the whole tensor, zeros positive."""
    return np.where(x >= 0, 1.0, -1.0) * np.abs(x).mean(dtype=np.float64)


def grace_onebit(x: np.ndarray) -> np.ndarray:
    """``OneBitCompressor``, as it is meant: two means of the whole tensor."""
    below = x < 0
    means = [x[side].mean(dtype=np.float64) if side.any() else 0.0 for side in (below, ~below)]
    return np.where(below, *means)


def grace_vote(xs: list[np.ndarray]) -> np.ndarray:
    """``SignSGDCompressor``: the sign of the sum of signs, zeros positive."""
    return np.where(sum(np.where(x >= 0, 1.0, -1.0) for x in xs) >= 0, 1.0, -1.0)


def grace_top(x: np.ndarray, ratio: float) -> np.ndarray:
    """``TopKCompressor``: ``int(d ratio)`` of the largest magnitudes, one at least."""
    places = np.argsort(-np.abs(x), kind="stable")[: max(1, int(len(x) * ratio))]
    out = np.zeros_like(x)
    out[places] = x[places]
    return out


class GraceResidual:
    """``ResidualMemory``: beta times what was left over, and gamma times the gradient."""

    def __init__(self, beta: float = 1.0, gamma: float = 1.0) -> None:
        self.left: np.ndarray | None = None
        self.beta, self.gamma = beta, gamma

    def compensate(self, x: np.ndarray) -> np.ndarray:
        return x if self.left is None else self.beta * self.left + self.gamma * x

    def update(self, compensated: np.ndarray, sent: np.ndarray) -> None:
        self.left = compensated - sent


class GraceSignResidual(GraceResidual):
    """``EFSignSGDMemory``: the gradient comes with the learning rate in it, but for the first one; the sum of
    what the ranks sent is divided by it."""

    def __init__(self, lr: float) -> None:
        super().__init__(1.0, lr)


class GraceDeepGradient:
    """``DgcMemory``: momentum and its sum, both cleared where something was sent."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.u: np.ndarray | None = None
        self.v: np.ndarray | None = None

    def compensate(self, x: np.ndarray) -> np.ndarray:
        self.u = x if self.u is None else self.momentum * self.u + x
        self.v = self.u.copy() if self.v is None else self.v + self.u
        return self.v

    def update(self, sent: np.ndarray) -> None:
        assert self.u is not None
        assert self.v is not None
        self.u, self.v = self.u * (sent == 0), self.v * (sent == 0)


def grace_powersgd(ms: list[np.ndarray], q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``PowerSGDCompressor``: the estimate, which is also what each rank subtracts, and the next q."""
    p = _gram_schmidt(np.mean([m @ q for m in ms], axis=0))
    q = np.mean([m.T @ p for m in ms], axis=0)
    return p @ q.T, q


def _gram_schmidt(matrix: np.ndarray) -> np.ndarray:
    columns: list[np.ndarray] = []
    for column in matrix.T:
        rest = column - sum(((c @ column) * c for c in columns), np.zeros_like(column))
        columns.append(rest / np.linalg.norm(rest))
    return np.stack(columns, axis=1)


def cgx_maxmin(v: np.ndarray, u: np.ndarray, bits: int) -> np.ndarray:
    """``MaxMinQuantizer``, one bucket: ``2^bits`` levels from the smallest value to the largest."""
    return cgx_range(v, u, float(v.min()), float(v.max()), 2**bits - 1)


def cgx_range(v: np.ndarray, u: np.ndarray, low: float, high: float, steps: int) -> np.ndarray:
    """Its arithmetic over any range."""
    unit = (high - low) / steps
    if unit < 1e-10:
        return np.full_like(v, low)
    return low + unit * np.floor((v.astype(np.float64) - low) / unit + u)


def cgx_all_reduce(xs: list[np.ndarray], us: list[np.ndarray], second: np.ndarray, bits: int) -> np.ndarray:
    """``AllreduceCompressed``, one bucket a rank: the owner's own chunk is added as it is, and the sum is
    quantized again, for its owner, too. The sum over the ranks."""
    total = np.zeros(len(xs[0]))
    for owner, chunk in enumerate(np.array_split(np.arange(len(xs[0])), len(xs))):
        parts = [
            x[chunk] if rank == owner else cgx_maxmin(x[chunk], us[rank][chunk], bits)
            for rank, x in enumerate(xs)
        ]
        total[chunk] = cgx_maxmin(np.sum(parts, axis=0), second[chunk], bits)
    return total


def choco_qsgd(x: np.ndarray, u: np.ndarray, levels: int, is_biased: bool) -> np.ndarray:
    """``get_qsgd``: one norm for the whole tensor; damped by the bound of Lemma 3.1 where ``is_biased``."""
    rounded = grace_qsgd(x, u, levels, len(x))
    d = len(x)
    return rounded / (min(d / levels**2, np.sqrt(d) / levels) + 1.0) if is_biased else rounded


class ChocoFromZero:
    """``ParallelCHOCO``: public copies that begin at zero, and their weighted sum, kept by all workers."""

    def __init__(self, weights: np.ndarray, d: int, gamma: float, k: int) -> None:
        self.weights, self.gamma, self.k = weights, gamma, k
        self.public = np.zeros((len(weights), d))
        self.memory = np.zeros((len(weights), d))

    def step(self, models: np.ndarray) -> np.ndarray:
        models = models + self.gamma * (self.memory - self.public)
        sent = np.stack([grace_top(row, self.k / models.shape[1]) for row in models - self.public])
        self.public = self.public + sent
        self.memory = self.memory + self.weights @ sent
        return models


class SqueezeFromZero:
    """``DeepSqueeze`` of the same repository."""

    def __init__(self, weights: np.ndarray, d: int, eta: float, k: int) -> None:
        self.weights, self.eta, self.k = weights, eta, k
        self.memory = np.zeros((len(weights), d))

    def step(self, models: np.ndarray) -> np.ndarray:
        self.memory = self.memory + models
        sent = np.stack([grace_top(row, self.k / models.shape[1]) for row in self.memory])
        self.memory = self.memory - sent
        return models + self.eta * (self.weights - np.eye(len(models))) @ sent
