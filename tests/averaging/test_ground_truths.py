"""What the papers prove, seen in lock-step: floors, machine zero, noise that averages out, conditions."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from distcomp.averaging.extrapolation import ECD
from distcomp.averaging.gossip import DCD, DPSGD, Choco, DeepSqueeze, default_gamma
from distcomp.averaging.periodic import Mean, Periodic
from distcomp.averaging.recipes.gossip import ecd
from distcomp.averaging.workers import Workers
from distcomp.compressors import Compressor, NonUniform, Quantize, RandomK, ScaledSign, TopK
from distcomp.compressors.contraction import relative_error
from distcomp.compressors.fixed import FixedGrid, GrowingGrid
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import qsgd
from tests.averaging.problems import Quadratic, consensus, errors_at, stacked

EIGHT_BITS = Quantize(8, block=64)
COARSE = FixedGrid(spacing=0.5, bits=20)
MARKS = (100, 300)
ZERO = 1e-12
"""Where float32 ends: squares of a few units in the last place."""


@pytest.fixture(scope="module")
def training_task() -> Quadratic:
    return Quadratic(4, 128)


def test_naive_compressed_gossip_has_a_floor(training_task: Quadratic) -> None:
    early, late = errors_at(training_task, DPSGD(EIGHT_BITS), MARKS)
    assert late > 1e-6
    assert late / early > 0.5


def test_uncompressed_gossip_has_none(training_task: Quadratic) -> None:
    assert errors_at(training_task, DPSGD(), MARKS)[1] < ZERO


def test_dcd_reaches_machine_zero_where_naive_gossip_stalls(training_task: Quadratic) -> None:
    assert errors_at(training_task, DCD(EIGHT_BITS), MARKS)[1] < ZERO


@pytest.mark.parametrize("compressor", [Quantize(4, block=64), TopK(0.25)], ids=str)
def test_choco_reaches_it_with_coarser_compressors(training_task: Quadratic, compressor: Quantize) -> None:
    assert errors_at(training_task, Choco(compressor), MARKS)[1] < ZERO


@pytest.fixture(scope="module")
def ecd_errors(training_task: Quadratic) -> list[float]:
    return errors_at(training_task, ECD(COARSE), MARKS)


def test_ecd_falls_as_one_over_t_on_an_absolute_grid(ecd_errors: list[float]) -> None:
    early, late = ecd_errors
    assert 0.5 * MARKS[0] / MARKS[1] < late / early < 2 * MARKS[0] / MARKS[1]


def test_an_absolute_grid_stops_dcd_and_naive_gossip_but_not_choco(
    training_task: Quadratic, ecd_errors: list[float]
) -> None:
    """DCD needs a relative quantizer as ECD needs an absolute one."""
    ecd = ecd_errors[1]
    assert errors_at(training_task, DPSGD(COARSE), MARKS[1:])[0] > 2 * ecd
    assert errors_at(training_task, DCD(COARSE), MARKS[1:])[0] > 2 * ecd
    assert errors_at(training_task, Choco(COARSE, gamma=0.4), MARKS[1:])[0] < ZERO


def test_ecd_counts_what_its_grid_had_to_clamp(training_task: Quadratic) -> None:
    narrow = training_task.train(ECD(FixedGrid(1 / 64, bits=4)), 50).fragments[0][0]
    assert narrow.averaging.report(narrow.state)["overflow"]["x"] > 0
    growing = training_task.train(ECD(GrowingGrid(1 / 64, bits=10)), 50).fragments[0][0]
    assert growing.averaging.report(growing.state) == {"overflow": {}}
    short = training_task.train(ECD(GrowingGrid(1 / 4096, bits=2)), 50).fragments[0][0]
    assert short.averaging.report(short.state)["overflow"]["x"] > 0


def test_ecd_widens_its_grid_instead_of_clamping(training_task: Quadratic) -> None:
    """A grid of 2 bits that reaches 1/4096 at first, and optima at distance 1: still it gets there."""
    assert errors_at(training_task, ECD(GrowingGrid(1 / 4096, bits=2)), (200,))[0] < 0.1


MODELS = {
    "weights of 1": lambda draw: draw,
    "weights of 10": lambda draw: 10 * draw,
    "weights of a thousandth": lambda draw: 1e-3 * draw,
    "one weight of 100": lambda draw: torch.cat([torch.tensor([100.0]), 0.02 * draw[1:]]),
    "all ones": torch.ones_like,
}


@pytest.mark.parametrize("name", MODELS)
def test_ecd_leaves_models_alone_that_nobody_trains(name: str) -> None:
    """Eight equal workers, no gradient: by the equations nothing moves."""
    x = MODELS[name](torch.randn(600, generator=torch.Generator().manual_seed(1)))
    workers = Workers(ecd(), x, 8)
    for _ in range(50):
        workers.step()
    assert float((workers.stacked - x).abs().max()) <= 0.01 * float(x.abs().median())


@pytest.mark.parametrize("name", MODELS)
def test_ecd_follows_uncompressed_gossip_whatever_the_size_of_the_weights(name: str) -> None:
    """Local updates of a hundredth of a typical weight: the means stay within 1 % of it of one another."""
    x = MODELS[name](torch.randn(600, generator=torch.Generator().manual_seed(1)))
    typical = float(x.abs().median())
    means = []
    for averaging in (ecd(), DPSGD()):
        generator, workers = torch.Generator().manual_seed(2), Workers(averaging, x, 4)
        for _ in range(60):
            workers.stacked += 0.01 * typical * torch.randn(4, 600, generator=generator)
            workers.step()
        means.append(workers.mean)
    assert float((means[0] - means[1]).square().mean().sqrt()) < 0.01 * typical


def test_ecd_refuses_a_grid_that_would_clamp_the_model() -> None:
    with pytest.raises(DistcompError, match=r"ends at 0\.109, and the model's largest weight is 2,"):
        Workers(ECD(FixedGrid(1 / 64, bits=4)), torch.full((5,), 2.0), 3)


def test_ecd_with_a_relative_quantizer_and_noise_diverges_where_choco_does_not(
    training_task: Quadratic,
) -> None:
    """The negative result: what is extrapolated grows with t, and with it a relative error."""

    def noisy(averaging: object) -> float:
        generator = torch.Generator().manual_seed(2)

        def disturb(workers: object) -> None:
            for model in workers.models:  # type: ignore[attr-defined]
                model += 0.05 * torch.randn(model.numel(), generator=generator)

        return training_task.error(training_task.train(averaging, 200, watch=disturb))  # type: ignore[arg-type]

    two_bits = Quantize(2, block=64)
    assert noisy(ECD(two_bits, allow_relative=True)) > 10
    assert noisy(Choco(two_bits)) < 0.01


def test_quantizing_the_model_fails_where_quantizing_the_difference_does_not(
    training_task: Quadratic,
) -> None:
    """PQASGD's control: at 2 bits averaging quantized models is no training at all."""
    good = training_task.train(Periodic(qsgd(bits=2, block=64), period=2), 200)
    bad = training_task.train(Mean(qsgd(bits=2, block=64), period=2), 200)
    assert training_task.error(good) < 0.04
    assert training_task.error(bad) > 30 * training_task.error(good)


class TestConditions:
    LAYOUT = Layout.of([("w", (64, 64))])

    def test_dcd_warns_with_the_numbers_outside_its_condition(self) -> None:
        numbers = DCD(Quantize(2)).conditions(self.LAYOUT, 8)
        assert numbers["alpha"] > numbers["alpha_limit"] == pytest.approx(0.073, abs=1e-3)
        assert "0.0732" in numbers["warning"]
        assert "warning" not in DCD(Quantize(8)).conditions(self.LAYOUT, 8)

    def test_alpha_is_the_relative_error(self) -> None:
        assert relative_error(TopK(0.25), self.LAYOUT) == pytest.approx(0.52, abs=0.03)
        assert relative_error(ScaledSign(), self.LAYOUT) == pytest.approx((1 - 2 / torch.pi) ** 0.5, abs=0.02)

    def test_biases_that_are_sent_as_they_are_count_as_exact(self) -> None:
        assert relative_error(Quantize(2, plain=("bias",)), Layout.of([("b", (100,))])) == 0

    def test_choco_reports_delta_gamma_and_what_is_proven(self) -> None:
        numbers = Choco(TopK(0.1)).conditions(self.LAYOUT, 8)
        assert numbers["gamma"] == default_gamma(numbers["delta"])
        assert 0 < numbers["gamma_proven"] < numbers["gamma"]
        assert numbers["damping"] == 1
        assert Choco(TopK(0.1), gamma=0.07).conditions(self.LAYOUT, 8)["gamma"] == 0.07

    def test_an_unbiased_compressor_is_damped(self) -> None:
        """L2 norm over 1024 values at 2 bits: undamped CHOCO diverges, damped it converges."""
        wild = Quantize(2, block=1024, norm="l2")
        layout = Layout.of([("x", (1024,))])
        omega = relative_error(wild, layout) ** 2
        assert omega > 5
        choco = Choco(wild, gamma=0.02)
        assert choco.tuned(layout)[1] == pytest.approx(1 / (1 + omega))
        starts = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
        before = float((starts - starts.mean(0)).square().mean())
        assert consensus(choco, starts, 150).spread < before
        undamped = replace(choco, compressor=Undamped(2, block=1024, norm="l2"))
        assert not consensus(undamped, starts, 150).spread < 1e3 * before

    @pytest.mark.parametrize("topology", ["ring", "star", "complete"])
    @pytest.mark.parametrize("compressor", [TopK(0.01), TopK(0.1), Quantize(2), ScaledSign()], ids=str)
    def test_the_default_gamma_does_not_diverge(self, topology: str, compressor: Quantize) -> None:
        starts = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
        apart = float((starts - starts.mean(0)).square().mean())
        assert consensus(Choco(compressor, topology), starts, 40).spread < apart


class Undamped(Quantize):
    """Says that it is biased, so that nobody damps it."""

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return False


def test_choco_preserves_the_sum_of_models() -> None:
    starts = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    workers = consensus(Choco(ScaledSign(), "star"), starts, 100)
    assert workers.spread < 0.5 * float((starts - starts.mean(0)).square().mean())
    torch.testing.assert_close(stacked(workers).sum(0), starts.sum(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("compressor", [Quantize(2), NonUniform(3), RandomK(0.1)], ids=str)
def test_deepsqueeze_damps_what_is_unbiased_and_does_not_contract(compressor: Compressor) -> None:
    """Pure consensus on a ring of 8: undamped, 2 bits are 10^5 apart after 200 exchanges."""
    starts = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    apart = float((starts - starts.mean(0)).square().mean())
    assert consensus(DeepSqueeze(compressor, eta=0.05), starts, 150).spread < 0.1 * apart


def test_deepsqueeze_says_in_numbers_how_it_is_damped_and_when_its_eta_is_too_large() -> None:
    layout = Layout.of([("w", (64, 64))])
    numbers = DeepSqueeze(Quantize(2)).conditions(layout, 8)
    omega = relative_error(Quantize(2), layout) ** 2
    assert omega > 1
    assert numbers["damping"] == pytest.approx(1 / (1 + omega))
    assert "warning" not in numbers
    assert "delta = 0.37" in DeepSqueeze(Quantize(2), eta=0.5).conditions(layout, 8)["warning"]


def test_deepsqueeze_needs_a_small_eta() -> None:
    starts = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    apart = float((starts - starts.mean(0)).square().mean())
    sign = ScaledSign()
    assert consensus(DeepSqueeze(sign, eta=0.05), starts, 100).spread < apart
    with warnings.catch_warnings():
        assert consensus(DeepSqueeze(sign, eta=1.0), starts, 100).spread > apart
