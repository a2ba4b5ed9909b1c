"""The robust isotonic fit against dynamic programming over the whole grid, and against outliers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.errors import DistcompError
from distcomp.network.isotonic import huber, isotonic_fit, noise, squares, tukey

LOSSES = [tukey, huber, squares]


def table(repeats: int) -> st.SearchStrategy[list[list[float]]]:
    number = st.floats(-50, 50).map(lambda x: round(x, 3))
    return st.lists(st.lists(number, min_size=repeats, max_size=repeats), min_size=1, max_size=12)


values = st.integers(1, 3).flatmap(table)


def oracle_losses(name: str, r: np.ndarray) -> np.ndarray:
    """The papers' formulas, written again."""
    if name == "tukey":
        c = 4.685
        return np.where(np.abs(r) <= c, c * c / 6 * (1 - (1 - r * r / (c * c)) ** 3), c * c / 6)
    if name == "huber":
        c = 1.345
        return np.where(np.abs(r) <= c, 0.5 * r * r, c * np.abs(r) - 0.5 * c * c)
    return 0.5 * r * r


def best_cost(y: np.ndarray, name: str, sigma: float, levels: int) -> float:
    """Dynamic programming over every point of the grid: the least cost of a rising sequence."""
    grid = np.linspace(y.min(), y.max(), 2**levels)
    cheapest = np.zeros(len(grid))
    for datum in y:
        losses = [oracle_losses(name, (grid - one) / sigma) for one in np.atleast_1d(datum)]
        cheapest = np.minimum.accumulate(cheapest) + sum(losses)
    return float(cheapest.min())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@given(y=values, sigma=st.sampled_from([0.3, 1.0, 5.0]), levels=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_it_is_the_optimum_on_the_grid(loss: Callable, y: list, sigma: float, levels: int) -> None:
    data = np.array(y)
    fit = isotonic_fit(data, loss, sigma, levels)
    assert (np.diff(fit) >= 0).all()
    if np.ptp(data):
        found = float(oracle_losses(loss.__name__, (fit[:, None] - data) / sigma).sum())
        assert found == pytest.approx(best_cost(data, loss.__name__, sigma, levels), rel=1e-9, abs=1e-9)
    else:
        assert (fit[:, None] == data).all()


def rising(seed: int, n: int = 40, repeats: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A rising truth, what was measured of it, and the same with a fifth of it grossly wrong."""
    rng = np.random.default_rng(seed)
    truth = np.sqrt(np.linspace(0, 100, n))
    clean = truth[:, None] + rng.normal(0, 0.1, (n, repeats))
    wrong = clean + (rng.random((n, repeats)) < 0.2) * rng.exponential(60, (n, repeats))
    return truth, clean, wrong


@pytest.mark.parametrize("seed", range(8))
def test_a_fifth_of_gross_outliers_moves_it_little_where_least_squares_is_lost(seed: int) -> None:
    truth, clean, wrong = rising(seed)

    def error(y: np.ndarray, loss: Callable) -> float:
        return float(np.sqrt(np.mean((isotonic_fit(y, loss) - truth) ** 2)))

    undisturbed = error(clean, squares)
    assert error(wrong, tukey) <= 2 * undisturbed
    assert error(wrong, squares) > 10 * undisturbed


def test_an_outlier_between_others_is_ignored_without_repetitions() -> None:
    y = np.linspace(0, 10, 101)
    y[50] += 40
    fit = isotonic_fit(y)
    assert abs(fit - np.linspace(0, 10, 101)).max() < 0.5


@pytest.mark.parametrize("repeats", [1, 5])
def test_the_noise_is_estimated_despite_outliers_and_rise(repeats: int) -> None:
    _, clean, wrong = rising(0, 200, repeats)
    assert noise(clean) == pytest.approx(0.1, rel=0.3)
    assert noise(wrong) == pytest.approx(0.1, rel=1.0)


def test_what_rises_already_stays_as_it_is() -> None:
    y = np.array([0.0, 1.0, 2.0, 3.0])
    assert np.allclose(isotonic_fit(y, squares, 1.0, 12), y, atol=3 / 4095)


@pytest.mark.parametrize("y", [[], [1.0, np.nan], [[[1.0]]]])
def test_what_is_no_curve_is_refused(y: list) -> None:
    with pytest.raises(DistcompError, match="leave out what is missing"):
        isotonic_fit(y)
