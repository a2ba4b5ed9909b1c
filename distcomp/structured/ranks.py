"""How many singular values of a matrix are signal: by energy, or by variational Bayes (EVBMF)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distcomp.errors import DistcompError

Rank = int | float | str
"""A number of components, a share of the energy in (0, 1), or ``"evbmf"``."""

GRID, REFINEMENTS = 256, 60


def chosen_rank(singular_values: Tensor, rows: int, columns: int, rank: Rank) -> int:
    """The rank that ``rank`` means for a matrix with these singular values (descending); 1 or more.

    Raises DistcompError for a rank that is no positive number, no share and not ``"evbmf"``.
    """
    if rank == "evbmf":
        return max(1, evbmf_rank(singular_values, rows, columns))
    if isinstance(rank, str | bool) or rank <= 0:
        raise DistcompError(f"a rank is a number of components, a share of energy or 'evbmf', not {rank!r}")
    if isinstance(rank, int):
        return min(rank, len(singular_values))
    if rank >= 1:
        raise DistcompError(
            f"a share of the energy lies below 1, not at {rank}; for components give a whole number"
        )
    energy = singular_values.double().square().cumsum(0)
    return min(len(singular_values), int((energy < rank * energy[-1]).sum()) + 1)


def evbmf_rank(singular_values: Tensor, rows: int, columns: int) -> int:
    """The rank of empirical variational Bayes matrix factorization, whose solution is analytic.

    ::

        keep s_h > sqrt(M sigma^2 (1 + tau)(1 + alpha / tau)),    alpha = L / M (L <= M),    tau = 2.5129
        sqrt(alpha)

    where the noise's variance ``sigma^2`` minimizes the free energy, a function of one variable: on a grid of
    256 in its logarithm, then by golden sections.

    Source: Nakajima et al., Global analytic solution of fully-observed variational Bayesian matrix
    factorization, JMLR 2013. ``tau`` is their approximation of its solution.
    """
    smaller, larger = sorted((rows, columns))
    squares = singular_values.double().cpu()[:smaller].square()
    if not bool(torch.isfinite(squares).all()):
        raise DistcompError("a weight holds a NaN or an infinity; no rank can be chosen for it")
    if float(squares.sum()) == 0.0:
        return 0
    alpha = smaller / larger
    tau = 2.5129 * math.sqrt(alpha)
    bound = (1 + tau) * (1 + alpha / tau)
    most = max(0, min(math.ceil(smaller / (1 + alpha)) - 1, smaller) - 1)
    rest = squares[min(most + 1, smaller - 1) :]
    low = max(float(rest[0]) / (larger * bound), float(rest.mean()) / larger)
    high = float(squares.sum()) / (smaller * larger)
    low = min(max(low, 1e-12 * high), high)
    variance = _least(low, high, squares, alpha, larger, bound)
    return int((squares > larger * variance * bound).sum())


def _free_energy(variance: float, squares: Tensor, alpha: float, larger: int, bound: float) -> float:
    """Up to a constant, of a noise of this variance."""
    x = squares / (larger * variance)
    signal, noise = x[x > bound], x[x <= bound].clamp(min=1e-300)
    gap = signal - (1 + alpha)
    tau = 0.5 * (gap + (gap.square() - 4 * alpha).clamp(min=0).sqrt())
    kept = (signal - tau + ((tau + 1) / signal).log() + alpha * (tau / alpha + 1).log()).sum()
    return float((noise - noise.log()).sum() + kept)


def _least(low: float, high: float, squares: Tensor, alpha: float, larger: int, bound: float) -> float:
    """The variance of least free energy."""

    def energy(logarithm: float) -> float:
        return _free_energy(math.exp(logarithm), squares, alpha, larger, bound)

    grid = torch.linspace(math.log(low), math.log(high), GRID, dtype=torch.float64).tolist()
    best = min(range(GRID), key=lambda position: energy(grid[position]))
    left, right = grid[max(0, best - 1)], grid[min(GRID - 1, best + 1)]
    section = (math.sqrt(5) - 1) / 2
    for _ in range(REFINEMENTS):
        one, two = right - section * (right - left), left + section * (right - left)
        left, right = (left, two) if energy(one) <= energy(two) else (one, right)
    return math.exp((left + right) / 2)
