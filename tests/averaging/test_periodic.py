"""Periodic averaging: when, what, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distcomp.averaging.base import MultiLevel
from distcomp.averaging.outer import Outer
from distcomp.averaging.periodic import Mean, Periodic
from distcomp.averaging.recipes import (
    choco,
    diloco,
    ecd,
    local_sgd,
    multi_level,
    post_local_sgd,
    pqasgd,
    sparse_averaging,
    sparse_loco,
    sparta,
    streaming_diloco,
)
from distcomp.averaging.workers import Workers
from distcomp.collectives import all_reduce_sent_bytes
from distcomp.compressors import TopK
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import ErrorFeedback, from_compressor, parse, qsgd, topk
from distcomp.schedule import Schedule

LAYOUT = Layout.of([("a", (32, 40)), ("b", (40,)), ("c", (40, 20)), ("d", (20,))])


def drift(workers: Workers, seed: int = 0) -> None:
    """Every worker goes its own way."""
    generator = torch.Generator().manual_seed(1000 * seed + workers.steps)
    for model in workers.models:
        model += torch.randn(model.numel(), generator=generator)


def agreement(averaging: object, steps: int) -> list[bool]:
    """After which steps all workers hold the same."""
    workers = Workers(averaging, torch.zeros(LAYOUT.numel), 4, LAYOUT)  # type: ignore[arg-type]
    found = []
    for _ in range(steps):
        drift(workers)
        workers.step()
        found.append(all(torch.equal(model, workers.models[0]) for model in workers.models))
    return found


def test_all_agree_every_period_steps() -> None:
    assert agreement(local_sgd(period=3), 7) == [False, False, True, False, False, True, False]


def test_the_period_may_be_a_schedule() -> None:
    expected = [True, True, True, False, False, True, False, False, True]
    assert agreement(local_sgd(period="1 -> 3 @ 4"), 9) == expected
    assert agreement(parse("local_sgd:period=1 -> 3 @ 4"), 9) == expected
    assert agreement(Periodic(period=Schedule(((0, 1), (4, 3)))), 9) == expected


def test_post_local_sgd_agrees_up_to_its_switch_and_then_every_period_steps() -> None:
    agreed = [
        step for step, all_agree in enumerate(agreement(post_local_sgd(5, after=20), 31), 1) if all_agree
    ]
    assert agreed == [*range(1, 21), 25, 30]


def test_fragments_take_turns() -> None:
    """Each step another quarter of the model agrees; every quarter every fourth step."""
    workers = Workers(
        sparse_averaging(period=4, schedule="round_robin"), torch.zeros(LAYOUT.numel), 3, LAYOUT
    )
    fragments = [fragment.layout for fragment in workers.fragments[0]]
    assert sum(piece.numel for piece in fragments) == LAYOUT.numel
    for step in range(8):
        drift(workers)
        before = [model.clone() for model in workers.models]
        workers.step()
        moved = (workers.models[0] != before[0]).nonzero().flatten()
        at = sum(piece.numel for piece in fragments[: step % 4])
        expected = torch.arange(at, at + fragments[step % 4].numel)
        assert torch.equal(moved, expected)


def test_a_fragment_of_whole_parameters_is_every_so_manieth() -> None:
    parts = Periodic(fragments=3, cut="parameters").fragments_of(LAYOUT)
    assert [part.names for part in parts] == [("a", "d"), ("b",), ("c",)]
    assert len(Periodic(fragments=9, cut="parameters").fragments_of(LAYOUT)) == 4


def test_an_overlapped_exchange_is_used_later_and_mixed() -> None:
    """What was agreed at step 4 about the models of step 4 meets the models of step 6."""
    averaging = Periodic(period=4, overlap=2, alpha=0.25)
    workers = Workers(averaging, torch.zeros(LAYOUT.numel), 4, LAYOUT)
    agreed = torch.zeros(0)
    for step in range(1, 7):
        drift(workers)
        if step == 4:
            agreed = torch.stack(workers.models).mean(0)
        before = [model.clone() for model in workers.models]
        workers.step()
        if step < 6:
            assert all(torch.equal(model, old) for model, old in zip(workers.models, before, strict=True))
    for model, old in zip(workers.models, before, strict=True):
        torch.testing.assert_close(model, 0.25 * old + 0.75 * agreed)


def test_sparta_averages_another_share_each_time() -> None:
    workers = Workers(sparta(share=0.25), torch.zeros(LAYOUT.numel), 4, LAYOUT)
    moved: list[Tensor] = []
    for _ in range(3):
        drift(workers)
        before, mean = workers.models[0].clone(), torch.stack(workers.models).mean(0)
        workers.step()
        changed = workers.models[0] != before
        torch.testing.assert_close(workers.models[0][changed], mean[changed])
        assert all(torch.equal(model[changed], workers.models[0][changed]) for model in workers.models)
        assert changed.sum() == pytest.approx(0.25 * LAYOUT.numel, rel=0.02)
        moved.append(changed)
    assert not torch.equal(moved[0], moved[1])
    sent = sum(all_reduce_sent_bytes(4 * int(changed.sum()), 4) for changed in moved)
    assert workers.net.ledgers[0].sent_bytes["values"] == sent


def test_small_parameters_have_their_turn_in_sparta() -> None:
    workers = Workers(sparta(share=0.005), torch.zeros(20), 2, Layout.of([("d", (20,))]))
    for _ in range(100):
        drift(workers)
        workers.step()
    assert 2 <= sum(ledger.requests["AllReduce"] for ledger in workers.net.ledgers[:1]) <= 100
    assert 0 < workers.net.ledgers[0].sent_bytes["values"] <= 100 * 4


def test_groups_agree_often_and_all_agree_rarely() -> None:
    workers = Workers(multi_level("local_sgd:period=4", period=1, ranks_per_group=2), torch.zeros(60), 4)
    for step in range(1, 9):
        drift(workers)
        workers.step()
        a, b, c, d = workers.models
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert torch.equal(a, c) == (step % 4 == 0)


def test_error_feedback_loses_nothing_over_syncs() -> None:
    """Anchor plus what is still owed is where exact averaging would be."""
    exact = Workers(Periodic(period=2), torch.zeros(400), 4)
    sparse = Workers(
        Periodic(ErrorFeedback(from_compressor(TopK(0.1), "all_gather")), period=2), torch.zeros(400), 4
    )
    for _ in range(10):
        drift(exact)
        drift(sparse)
        exact.step()
        sparse.step()
    fragments = [fragments[0] for fragments in sparse.fragments]
    residual = torch.stack([fragment.state["method"]["residual"].data for fragment in fragments]).mean(0)
    assert residual.norm() > 1
    torch.testing.assert_close(sparse.models[0] - residual, exact.models[0], atol=1e-4, rtol=1e-4)


def test_a_residual_fades() -> None:
    method = ErrorFeedback(from_compressor(TopK(0.1), "all_gather"), decay=0.5)
    workers = Workers(Periodic(method, period=1), torch.zeros(10), 1)
    workers.models[0] -= torch.arange(1.0, 11.0)  # the outer gradient is 1 .. 10; the largest goes
    workers.step()
    assert torch.equal(workers.models[0], torch.tensor([0.0] * 9 + [-10.0]))
    workers.step()  # nothing new: half of 1 .. 9 is owed, and 9/2 goes
    assert torch.equal(workers.models[0], torch.tensor([0.0] * 8 + [-4.5, -10.0]))


def test_the_papers_names_are_settings_of_one_class() -> None:
    assert diloco() == Periodic(outer=Outer(0.7, 0.9, nesterov=True), period=500)
    assert diloco(compressor="qsgd:bits=4").method == qsgd(bits=4)
    assert diloco(compressor=TopK(0.1)).method == ErrorFeedback(from_compressor(TopK(0.1)))
    assert pqasgd(period=2, bits=2, schedule="round_robin").fragments == 2
    assert sparse_loco().method.decay == 0.95
    assert streaming_diloco(fragments=8).cut == "parameters"
    assert isinstance(multi_level(), MultiLevel)
    assert parse("pqasgd:period=2,bits=2") == pqasgd(period=2, bits=2)
    assert parse("diloco:period=50,compressor=(topk:ratio=0.03,values=int2)").period == 50
    assert diloco(50, topk(0.03, values="2bit")) == parse(
        "diloco:period=50,compressor=(topk:ratio=0.03,values=int2)"
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: local_sgd(period=0), "at least 1"),
        (lambda: local_sgd(period="1 -> 0 @ 5"), "at least 1"),
        (lambda: streaming_diloco(period=4, overlap=4), "below the period"),
        (lambda: streaming_diloco(fragments=0), "at least 1 fragment"),
        (lambda: streaming_diloco(alpha=1.0), "alpha"),
        (lambda: local_sgd(optimizer_state="forget"), "'keep', 'reset' or 'average'"),
        (lambda: sparse_averaging(schedule="round_robin", optimizer_state="reset"), "'keep' only"),
        (lambda: pqasgd(period="1 -> 2 @ 3", schedule="round_robin"), "fixed period"),
        (lambda: pqasgd(schedule="random"), "round_robin"),
        (lambda: diloco(outer_lr=0.0), "lr > 0"),
        (lambda: sparta(share=0.0), "share"),
        (lambda: Mean(ErrorFeedback(from_compressor(TopK(0.1)))), "keeps state"),
        (lambda: Workers(Mean(ranks_per_group=3), torch.zeros(4), 4), "whole number of groups"),
        (lambda: multi_level("qsgd"), "averages no models"),
        (lambda: choco("powersgd"), "one payload"),
        (lambda: choco(on_failure="ignore"), "'stop' or 'continue'"),
        (lambda: ecd(compressor="qsgd:bits=8"), "allow_relative=True"),
        (lambda: ecd(bits=1), "2 to 23 bits"),
        (lambda: parse("choco:gamma=1 -> 0.5 @ 10"), "gamma cannot change"),
        (
            lambda: (
                Workers(choco(topology="one_peer_exponential"), torch.zeros(4), 4)
                .fragments[0][0]
                .averaging.conditions(LAYOUT, 4)
            ),
            "must not change",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: object, sentence: str) -> None:
    with pytest.raises(DistcompError, match=sentence):
        wrong()  # type: ignore[operator]
