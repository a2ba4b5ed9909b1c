"""The algorithms once more, in NumPy and float64, written from the papers in matrix form: row i is worker i.

``step(x)`` gives every worker's local update, ``C`` compresses each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Rows = Callable[[Matrix], Matrix]


def dpsgd(x: Matrix, W: Matrix, step: Rows, steps: int, adapt_first: bool = False) -> Matrix:
    for _ in range(steps):
        x = W @ (x - step(x)) if adapt_first else W @ x - step(x)
    return x


def dcd(x: Matrix, W: Matrix, step: Rows, C: Rows, steps: int) -> Matrix:
    replicas = x.copy()
    for _ in range(steps):
        half = W @ replicas - step(x)
        sent = C(half - x)
        x, replicas = x + sent, replicas + sent
    return x


def ecd(x: Matrix, W: Matrix, step: Rows, C: Rows, steps: int) -> Matrix:
    estimates = x.copy()
    for t in range(2, 2 + steps):
        new = W @ estimates - step(x)
        z = (1 - 0.5 * t) * x + 0.5 * t * new
        estimates = (1 - 2 / t) * estimates + (2 / t) * C(z)
        x = new
    return x


def choco(x: Matrix, W: Matrix, step: Rows, C: Rows, gamma: float, steps: int) -> Matrix:
    """With the weighted sum ``s`` of public copies, as the paper's memory-efficient form keeps it."""
    public = x.copy()
    s = W @ public
    for _ in range(steps):
        x = x - step(x)
        x = x + gamma * (s - public)
        q = C(x - public)
        public = public + q
        s = s + W @ q
    return x


def deepsqueeze(x: Matrix, W: Matrix, step: Rows, C: Rows, eta: float, steps: int) -> Matrix:
    error = np.zeros_like(x)
    for _ in range(steps):
        half = x - step(x)
        v = half + error
        c = C(v)
        error = v - c
        x = half + eta * (W @ c - c)
    return x


def periodic(
    x: Matrix, step: Rows, C: Rows, period: int, steps: int, lr: float = 1.0, momentum: float = 0.0
) -> Matrix:
    """Local steps; the mean of compressed differences; an outer Nesterov step."""
    anchor, m = x[0].copy(), np.zeros_like(x[0])
    for t in range(1, steps + 1):
        x = x - step(x)
        if t % period == 0:
            g = C(anchor - x).mean(axis=0)
            m = momentum * m + g
            anchor = anchor - lr * (g + momentum * m)
            x = np.repeat(anchor[None], len(x), axis=0)
    return x


def noloco(
    x: Matrix,
    step: Rows,
    pairs: Callable[[int], Sequence[int]],
    schedule: tuple[int, int],
    alpha: float,
    beta: float,
    gamma: float,
) -> Matrix:
    """Slow weights ``phi`` and momentum of each worker's own; ``pairs(t)`` names everybody's partner."""
    period, steps = schedule
    phi, delta = x.copy(), np.zeros_like(x)
    for t in range(1, steps + 1):
        x = x - step(x)
        if t % period == 0:
            partner = list(pairs(t))
            learnt = x - phi
            learnt, meeting = (learnt + learnt[partner]) / 2, (phi + phi[partner]) / 2
            delta = alpha * delta + beta * learnt - gamma * (phi - meeting)
            phi = phi + delta
            x = phi.copy()
    return x


def sgp(x: Matrix, P: Callable[[int], Matrix], step: Rows, steps: int) -> Matrix:
    """Push-sum: the same column-stochastic matrices mix ``x`` and ``w``; ``step`` is made at x / w."""
    w = np.ones((len(x), 1))
    for t in range(steps):
        half = x - step(x / w)
        x, w = P(t) @ half, P(t) @ w
    return x / w


def ad_psgd(x: Matrix, W: Callable[[int], Matrix], step: Rows, steps: int) -> Matrix:
    """Pairs average, and each adds the step that it computed at its model before; ``W(t)`` of exchange t."""
    x = x - step(x)  # before the first exchange
    for t in range(1, steps):
        x = W(t) @ x - step(x)
    return x


def muloco(
    x: Matrix,
    step: Rows,
    C: Rows,
    schedule: tuple[int, int],
    lr: float,
    momentum: float,
    decay: float,
) -> Matrix:
    """DiLoCo whose outer gradients are compressed with error feedback: the inner optimizer is ``step``."""
    period, steps = schedule
    anchor, m, e = x[0].copy(), np.zeros_like(x[0]), np.zeros_like(x)
    for t in range(1, steps + 1):
        x = x - step(x)
        if t % period == 0:
            owed = decay * e + (anchor - x)
            sent = C(owed)
            e = owed - sent
            g = sent.mean(axis=0)
            m = momentum * m + g
            anchor = anchor - lr * (g + momentum * m)
            x = np.repeat(anchor[None], len(x), axis=0)
    return x


def nearest(levels: int) -> Rows:
    """Multiples of a ``levels``-th of the largest magnitude of each row."""

    def compress(z: Matrix) -> Matrix:
        largest = np.abs(z).max(axis=1, keepdims=True)
        return np.rint(z / largest * levels) * largest / levels

    return compress


def des_loc(x: Matrix, gradient: Rows, periods: tuple[int, int, int], steps: int, rate: float) -> Matrix:
    """Adam (0.9, 0.999) whose weights and moments are averaged at three periods, before the step after."""
    u, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(x)
        u, v = 0.9 * u + 0.1 * g, 0.999 * v + 0.001 * g * g
        corrected = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        x = x - rate / (1 - 0.9**t) * u / corrected
        x, u, v = (
            np.repeat(each.mean(axis=0)[None], len(each), axis=0) if t % period == 0 else each
            for each, period in zip((x, u, v), periods, strict=True)
        )
    return x


def eager(x: Matrix, step: Rows, period: int, steps: int, lr: float, momentum: float) -> Matrix:
    """Each worker's outer optimizer steps with its own share now and the others' of a period ago."""
    n, anchor, m = len(x), x.copy(), np.zeros_like(x)
    before = np.zeros_like(x)
    for t in range(1, steps + 1):
        x = x - step(x)
        if t % period == 0:
            delta = anchor - x
            g = (delta - before) / n + before.mean(axis=0)
            before = delta
            m = momentum * m + g
            anchor = anchor - lr * (g + momentum * m)
            x = anchor.copy()
    return x


def bfloat16(x: Matrix) -> Matrix:
    """The nearest number of 8 significant bits; halves go to the even one."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def pulseloco(
    x: Matrix, step: Rows, period: int, steps: int, lr: float, momentum: float
) -> tuple[Matrix, list[int]]:
    """The workers' models, and how many values each has sent."""
    anchor, m, e = x[0].copy(), np.zeros_like(x[0]), np.zeros_like(x)
    sent = np.zeros(len(x), dtype=int)
    for t in range(1, steps + 1):
        x = x - step(x)
        if t % period == 0:
            v = e + (anchor - x)
            seen = bfloat16(anchor - v) != bfloat16(anchor)
            s = np.where(seen, v, 0.0)
            e, sent = v - s, sent + seen.sum(axis=1)
            g = s.mean(axis=0)
            m = momentum * m + g
            anchor = anchor - lr * (g + momentum * m)
            x = np.repeat(anchor[None], len(x), axis=0)
    return x, sent.tolist()


def top(k: int) -> Rows:
    """The k largest magnitudes of each row."""

    def compress(z: Matrix) -> Matrix:
        kept = np.zeros_like(z)
        for row, out in zip(z, kept, strict=True):
            largest = np.argsort(-np.abs(row), kind="stable")[:k]
            out[largest] = row[largest]
        return kept

    return compress
