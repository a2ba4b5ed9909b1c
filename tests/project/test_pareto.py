"""The study of loss against bytes: one forward for all workers, runs that fork, and what its table says."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch.func import functional_call

from benchmarks import pareto
from benchmarks._crowd import Oversubscription
from benchmarks._library_lm import (
    BYTES,
    CONTEXT,
    Draws,
    Reader,
    apart,
    dealt,
    library,
    loss_of,
    stacked,
)
from benchmarks._pareto_rows import (
    ALONE,
    APART,
    CONTROL,
    CORRECTIONS,
    DDP,
    EVERY_STEP,
    MUON,
    NEVER,
    ONLY_APART,
    RARE,
    ROWS,
    Row,
)
from benchmarks._pareto_table import line, more_steps, table, verdicts
from benchmarks.pareto import Found, Training, WarmUpStableDecay, tune
from distcomp.attaching.weights import Weights

DILOCO = Row("diloco:period=2,compressor=qsgd:bits=4", RARE)


def models_of(training: Training) -> torch.Tensor:
    return training.crowd.models.detach().clone()


def test_all_workers_at_once_are_each_worker_alone() -> None:
    """Scores, and the gradient of the sum of all losses: what a loop over plain modules has."""
    layout = Weights(Reader()).layout
    draw = torch.Generator().manual_seed(1)
    models = (0.2 * torch.randn(3, layout.numel, generator=draw)).requires_grad_()
    texts = torch.randint(BYTES, (3, 2, CONTEXT), generator=draw)
    following = torch.randint(BYTES, (3, 2, CONTEXT), generator=draw)
    scores = stacked(models, layout, texts)
    (together,) = torch.autograd.grad(3 * loss_of(scores.flatten(0, 1), following.flatten(0, 1)), models)
    for worker in range(3):
        named = {
            param.name: piece.view(param.shape).detach().requires_grad_()
            for param, piece in layout.pieces(models[worker])
        }
        alone = functional_call(Reader(), named, (texts[worker],))
        gradients = torch.autograd.grad(loss_of(alone, following[worker]), list(named.values()))
        torch.testing.assert_close(scores[worker], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together[worker], torch.cat([one.flatten() for one in gradients]), rtol=1e-3, atol=1e-6
        )


def test_a_batch_depends_on_seed_and_step_alone_and_lies_inside_a_workers_own_text() -> None:
    texts = [torch.full((200 + 50 * worker,), worker, dtype=torch.uint8) for worker in range(3)]
    draws, later = Draws(texts, 4, seed=7), Draws(texts, 4, seed=7, step=2)
    batches = [next(draws) for _ in range(3)]
    assert torch.equal(batches[2][0], next(later)[0])
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (3, 4, CONTEXT)
        for worker in range(3):
            assert {*inputs[worker].flatten().tolist(), *targets[worker].flatten().tolist()} == {worker}
    counting = Draws([torch.arange(250, dtype=torch.uint8)], 4, seed=1)
    first, second = next(counting), next(counting)
    assert torch.equal(first[0] + 1, first[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("cut", [dealt, apart])
def test_workers_share_the_text_out(cut) -> None:
    modules = [torch.full((97 + number,), number, dtype=torch.uint8) for number in range(40)]
    given = torch.cat(cut(modules, 8)).sort().values
    assert torch.equal(given, torch.cat(modules).sort().values)


def test_the_library_has_every_module_once() -> None:
    told = {bytes(text.numpy().tobytes()) for text in library()}
    assert len(told) == len(library()) > 300


def test_a_run_that_is_ended_goes_on_as_if_it_had_not_been() -> None:
    """Ended at 14 steps in a copy, then at 20: as a run that is ended at 20 alone; so are its bytes."""
    whole = Training("scratch", DILOCO, "", 4e-3, seed=3).end(20)
    both = Training("scratch", DILOCO, "", 4e-3, seed=3)
    first = both.ended(14)
    assert both.ended(20) == whole
    assert first["sent_bytes"] < whole["sent_bytes"]
    assert first["test_loss"] != whole["test_loss"]


def test_ddp_from_a_trained_model_is_ddp() -> None:
    straight = Training("scratch", DDP, "", 4e-3, seed=0)
    assert straight.reach(9)
    begun = Training("scratch", DDP, "", 4e-3, seed=0)
    assert begun.reach(5)
    kept = models_of(begun)
    gone_on = Training("scratch", DDP, "", 4e-3, seed=0, after=begun.crowd)
    assert gone_on.reach(9)
    assert torch.equal(models_of(gone_on), models_of(straight))
    assert torch.equal(models_of(begun), kept)


def test_workers_that_never_meet_part_and_those_of_ddp_do_not() -> None:
    apart_ = Training("scratch", Row(NEVER, CONTROL), "", 4e-3, seed=0)
    found = apart_.end(6)
    assert found["sent_bytes"] == 2 * 7 / 8 * 4 * apart_.crowd.layout.numel
    alone = Training("scratch", Row(ALONE, CONTROL), "", 4e-3, seed=0).end(6)
    own = [apart_.crowd.test(model)[0] for model in apart_.crowd.models.detach()]
    assert alone["test_loss"] == statistics.mean(own) != found["test_loss"]
    assert alone["sent_bytes"] == 0
    together = Training("scratch", DDP, "", 4e-3, seed=0)
    assert together.end(6)["sent_bytes"] == 6 * found["sent_bytes"]
    assert together.alike
    assert not apart_.alike


def test_the_rate_goes_up_stays_and_falls_to_nothing() -> None:
    rate = WarmUpStableDecay()
    assert rate(0) == 1 / pareto.WARM_UP
    assert rate(pareto.WARM_UP) == rate(10**9) == 1
    rate.ends_at = 1000
    assert rate(800) == 1
    assert rate(900) == pytest.approx(0.5)
    assert rate(1000) == 0


def test_each_regime_has_the_rows_that_it_names_and_each_correction_its_pair() -> None:
    named = {row.spec for row in pareto.rows_of("apart")}
    assert named == {*APART, *(row.spec for row in ONLY_APART)}
    assert named.isdisjoint(row.spec for row in ONLY_APART if row in pareto.rows_of("scratch"))
    assert all({corrected, plain} <= named for corrected, plain, _ in CORRECTIONS)
    planned = list(pareto.plan())
    assert len(planned) == len(set(planned))
    for regime in pareto.REGIMES:
        rows = [row for there, row, seed in planned if (there, seed) == (regime, 0)]
        assert rows == [*pareto.rows_of(regime)]
        assert regime == "trained" or rows[0] == DDP  # the others are held against it


def test_what_fails_in_the_copy_fails_here() -> None:
    with pytest.raises(RuntimeError, match="failed"):
        pareto.in_a_fork(lambda: {"loss": object()})


@pytest.mark.parametrize("best", [1e-3, 8e-3, 6.4e-2])
def test_a_rate_is_followed_to_where_both_neighbours_are_worse(best: float) -> None:
    tried: list[tuple[int, str]] = []

    def loss(steps: int, rate: float, setting: str) -> float:
        tried.append((steps, setting))
        return abs(math.log2(rate / best)) - (setting == "b")

    assert tune(Row("x", RARE, ("a", "b"), rate=8e-3), loss) == (pytest.approx(best), "b")
    assert set(tried[:-2]) == {(pareto.TUNING_STEPS, "a")}
    assert tried[-2:] == [(pareto.SETTING_STEPS, "a"), (pareto.SETTING_STEPS, "b")]


def test_the_steps_to_a_loss_are_read_off_the_lengths() -> None:
    run = {"test_loss": 1.2, "longer": {"4200": {"test_loss": 1.1}, "4800": {"test_loss": 0.8}}}
    assert more_steps(run, 1.2, 4000) == 0
    assert more_steps(run, 1.15, 4000) == pytest.approx(4100 / 4000 - 1)
    assert more_steps(run, 0.9, 4000) == pytest.approx(4600 / 4000 - 1)
    assert more_steps(run, 0.7, 4000) is None
    assert more_steps({"test_loss": 1.2}, 1.0, 4000) is None
    lost = {"test_loss": 1.2, "longer": {"4200": {"diverged": 4100}, "4800": {"diverged": 4100}}}
    assert more_steps(lost, 1.0, 4000) is None


def test_a_row_is_held_against_ddp_seed_by_seed() -> None:
    ddp = {seed: {"test_loss": 1.0 + seed, "sent_bytes": 8000.0} for seed in range(3)}
    runs = {0: {"test_loss": 1.1, "sent_bytes": 80.0}, 1: {"test_loss": 2.2, "sent_bytes": 80.0}}
    found = line(runs, ddp, 4000, 1)
    assert found["relative"] == [pytest.approx(1.1)] * 2
    assert (found["seeds"], found["diverged"], found["times_fewer_bytes"]) == (2, 0, 100)
    assert "mean_more_steps" not in found
    after = line(runs, ddp, 4000, 0.8)
    assert after["times_fewer_bytes"] == pytest.approx(80)
    assert after["times_fewer_in_all"] == pytest.approx(8000 / 1680)
    assert line({0: {"diverged": 9}}, ddp, 4000, 1) == {"seeds": 1, "diverged": 1}


def test_controls_are_derived_and_targets_need_their_bytes() -> None:
    ddp = {0: {"test_loss": 1.0, "sent_bytes": 1e6, "quarter": {"test_loss": 1.2, "sent_bytes": 2.5e5}}}
    never = {0: {"test_loss": 1.5, "sent_bytes": 10.0}}
    alone = {0: {"test_loss": 1.02, "sent_bytes": 0}}
    longer = {"4200": {"test_loss": 0.99}, "4800": {"test_loss": 0.9}}
    rare = {"test_loss": 1.01, "longer": longer}
    rows = {
        "identity": (DDP, ddp),
        NEVER: (Row(NEVER, CONTROL), never),
        ALONE: (Row(ALONE, CONTROL), alone),
        "near": (Row("near", RARE), {0: {**rare, "sent_bytes": 999.0}}),
        "often": (Row("often", EVERY_STEP), {0: {"test_loss": 1.01, "sent_bytes": 1e6 / 85}}),
        "often, more": (Row("often, more", EVERY_STEP), {0: {"test_loss": 1.01, "sent_bytes": 1e6 / 84}}),
        "worse": (Row("worse", EVERY_STEP), {0: {"test_loss": 1.011, "sent_bytes": 1.0}}),
        "dear": (Row("dear", RARE), {0: {**rare, "sent_bytes": 1001.0}}),
        "late": (Row("late", RARE), {}),
    }
    found = table(rows, ddp, 4000, 0)
    assert "late" not in found
    assert found["DDP fp32, a quarter of the steps"]["times_fewer_bytes"] == 4
    assert found[ALONE]["times_fewer_bytes"] is None
    met = verdicts({"scratch": found})
    assert met["rare"] == ["scratch | near"]
    assert met["equal steps"] == ["scratch | near", "scratch | often", "scratch | dear"]
    assert met["every step"] == ["scratch | often"]
    assert met["controls"] == [f"scratch | {NEVER}", "scratch | DDP fp32, a quarter of the steps"]


def test_with_muon_inside_a_row_is_held_against_both() -> None:
    def run(loss: float) -> Found:
        return {"test_loss": loss, "sent_bytes": 1e6}

    rows = {
        "identity": (DDP, {0: run(1.0), 1: run(1.0)}),
        f"identity{MUON}": (Row("identity", CONTROL, inner="Muon"), {0: run(0.8)}),
        f"rare{MUON}": (Row("rare", RARE, inner="Muon"), {0: run(1.0), 1: run(1.0)}),
        "rare": (Row("rare", RARE), {0: run(1.0)}),
    }
    found = table(rows, rows["identity"][1], 4000, 0)
    assert found[f"rare{MUON}"]["relative"] == [1.0, 1.0]
    assert found[f"rare{MUON}"]["relative_to_same_inside"] == [pytest.approx(1.25)]
    assert "relative_to_same_inside" not in found["rare"]


def test_every_row_can_be_made() -> None:
    assert len({(row.name) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        for setting in row.settings:
            assert row.carrier(setting)
    assert isinstance(Training("scratch", ROWS[-1], "", 8e-3, 0).crowd, Oversubscription)
