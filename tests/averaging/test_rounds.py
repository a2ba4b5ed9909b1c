"""Outer rounds of workers that die, come late and join: real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import distcomp
from distcomp.averaging.base import AveragingContext, fragment_states
from distcomp.averaging.lateness import Lateness, lateness_of
from distcomp.averaging.outer import Outer
from distcomp.averaging.periodic import Periodic
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import parse
from distcomp.methods.base import PerParameter, cut_state, map_state
from distcomp.randomness import Key
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep
from tests.averaging import round_jobs as jobs
from tests.cluster import Cluster, Failure

LAYOUT = Layout.of([("w", (4, 6)), ("b", (6,))])


@pytest.fixture
def five() -> Iterator[Cluster]:
    """Ranks of their own: one of them does not survive."""
    cluster = Cluster(5)
    yield cluster
    cluster.close()


@pytest.fixture
def four() -> Iterator[Cluster]:
    cluster = Cluster(4)
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    "spec",
    [
        "local_sgd:period=4,on_failure=(continue:quorum=2)",
        "diloco:period=4,outer_momentum=0.5,on_failure=(continue:download=lossless)",
        "sparse_loco:period=4,ratio=0.1,outer_momentum=0.5,on_failure=continue",
        "streaming_diloco:period=4,fragments=2,overlap=1,outer_momentum=0.5,on_failure=continue",
        "diloco:period=4,outer_momentum=0.5,compressor=(powersgd:rank=1),on_failure=continue",
    ],
    ids=["local_sgd", "diloco", "sparse_loco", "streaming", "powersgd"],
)
def test_one_dies_and_another_joins_and_no_outer_step_is_lost(spec: str, five: Cluster) -> None:
    found = five.results(jobs.killed_and_joined, spec, 2, 6, without=2)
    there = [found[rank] for rank in (0, 1, 3, 4)]
    assert not any(isinstance(one, Failure) for one in there), there
    founders, joined = there[:3], there[3]
    for one in there:
        assert one["workers"] == [0, 1, 3, 4]
        assert one["iterations"] == founders[0]["iterations"]
        assert one["exchanges"] == founders[0]["exchanges"]
        assert one["rounds"] == founders[0]["rounds"]
        assert torch.equal(one["end"], joined["end"])
        assert one["threads"] == []
        for outer_step, anchor in one["anchors"].items():
            assert anchor == founders[0]["anchors"][outer_step], outer_step
    for one in founders:
        assert one["steps"] == one["iterations"]  # nobody was restarted
        assert set(one["anchors"]) >= set(range(1, one["exchanges"] + 1))
        assert one["lost"] == [2]
        assert "worker 2 died or has ended; training goes on without it" in one["said"]
        assert "worker 4 has come; training goes on with it" in one["said"]
    assert 2 * jobs.PERIOD < joined["steps"] < joined["iterations"]


@pytest.mark.parametrize("misses", [1, 2])
def test_what_a_late_worker_learnt_is_carried_one_round_and_no_further(
    misses: int, cluster: Callable[[int], Cluster]
) -> None:
    spec = "diloco:period=4,outer_lr=0.5,outer_momentum=0.5,buffers=keep,on_failure=(continue:quorum=2)"
    found = cluster(3).run(jobs.late, spec, misses, 0.5)
    late = found[2]
    learnt = late["own"] - late["old"]
    assert learnt.norm() > 0
    carried = late["anchor"] + learnt if misses == 1 else late["anchor"]
    torch.testing.assert_close(late["own now"], carried)
    fate = "goes into the next round" if misses == 1 else "is dropped"
    assert any(fate in one for one in late["said"]), late["said"]
    for one in found[:2]:
        missed = "worker 2 did not come to outer round 2 within grace_s=0.5; training goes on without it"
        assert missed in one["said"]
        assert "worker 2 has come; training goes on with it" in one["said"]
    for one in found:
        assert one["workers"] == [0, 1, 2]
        assert one["lost"] == []
        assert torch.equal(one["end"], late["end"])
        for outer_step, anchor in one["anchors"].items():
            assert anchor == found[0]["anchors"][outer_step], outer_step


def test_fewer_than_the_quorum_are_one_clear_error(four: Cluster) -> None:
    spec = "diloco:period=4,on_failure=(continue:quorum=3)"
    found = four.results(jobs.too_few, spec, 4.0)
    for told in found[:2]:
        assert told == (
            "PeerLost: 2 of at least 3 workers (the quorum) came to outer round 2 within timeout_s=4: "
            "workers 0, 1; workers 2, 3 died or ended; let others join, or restart from the last "
            "checkpoint with a smaller quorum"
        )


def test_each_weighs_what_it_saw(cluster: Callable[[int], Cluster]) -> None:
    spec = "diloco:period=4,outer_lr=0.7,outer_momentum=0,buffers=keep,on_failure=continue"
    found = cluster(3).run(jobs.weighed, spec)
    weights = np.array([1.0, 4.0, 7.0])
    before = found[0]["before"].numpy().astype(np.float64)
    learnt = np.stack([before - one["own"].numpy() for one in found])
    expected = before - 0.7 * (weights @ learnt) / weights.sum()
    for one in found:
        np.testing.assert_allclose(one["after"].numpy(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(one["after"], found[0]["after"])


def test_who_joins_with_another_method_is_told(cluster: Callable[[int], Cluster]) -> None:
    told = cluster(3).run(jobs.refused_to_join)[-1]
    assert told.startswith("SettingsMismatch: this worker was to join with another method: the others have")


@pytest.mark.parametrize("method", ["identity", "qsgd:bits=4", "topk:ratio=0.2"])
def test_equal_weights_change_no_bit(method: str) -> None:
    """In rounds of those who come, a share of 1 is plain averaging."""
    plain = _stepped(Periodic(parse(method), Outer(0.7, 0.9)), shares=None)
    shared = _stepped(Periodic(parse(method), Outer(0.7, 0.9)), shares=[1.0, 1.0, 1.0])
    for one, other in zip(plain, shared, strict=True):
        assert torch.equal(one, other)


def _init(averaging: Periodic, seed: int) -> dict[str, Any]:
    x = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
    return dict(averaging.init(x, AveragingContext(0, 2, LAYOUT, 0, Key.of(0))))


def _stepped(averaging: Periodic, shares: list[float] | None) -> list[torch.Tensor]:
    size, generator = 3, torch.Generator().manual_seed(0)
    anchor = torch.randn(LAYOUT.numel, generator=generator)
    models = [anchor + 0.1 * torch.randn(LAYOUT.numel, generator=generator) for _ in range(size)]
    aggregations = []
    for rank, model in enumerate(models):
        share = {} if shares is None else {"share": shares[rank]}
        context = AveragingContext(rank, size, LAYOUT, 0, Key.of(0), **share)
        (fragment,) = fragment_states(averaging, LAYOUT, rank, size)
        fragment.start(anchor)
        aggregations.append(fragment.aggregation(model, context))
    return [result.estimate for result in in_lock_step(Lockstep(size), aggregations)]


def test_a_newcomer_is_handed_all_that_is_common_and_keeps_its_residual() -> None:
    averaging = Periodic(parse("powersgd:rank=1"), Outer(0.7, 0.9))
    theirs, mine = (_init(averaging, seed) for seed in (0, 1))
    for state in (theirs, mine):  # as after some exchanges
        state["method"] = map_state(
            state["method"],
            lambda _, leaf: FlatBuffer(torch.rand_like(leaf.data), leaf.layout),
            lambda _, leaf: PerParameter({name: torch.rand_like(q) for name, q in leaf.items()}),
        )
    joined = averaging.joined(averaging.common(theirs), mine)
    now, common, own = (cut_state(state) for state in (joined, theirs, mine))
    paths = {path for leaves in now.values() for path in leaves}
    assert {"anchor", "outer/momentum"} < paths
    assert {path.rpartition("/")[2] for path in paths} == {"anchor", "momentum", "residual", "q"}
    for name, leaves in now.items():
        for path, value in leaves.items():
            expected = own if path.endswith("residual") else common
            assert torch.equal(value, expected[name][path]), path


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: lateness_of("continue:quorum=0"), "a quorum is 1 worker at least"),
        (lambda: lateness_of("continue:grace_s=-1"), "grace_s 0 seconds or more"),
        (lambda: lateness_of("continue:download=qsgd"), "plain or lossless"),
        (lambda: lateness_of("ignore"), "'stop' or 'continue'"),
        (lambda: lateness_of("continue:patience=1"), "has no setting"),
        (lambda: distcomp.choco(on_failure="continue:quorum=2"), "holds no rounds"),
        (
            lambda: Periodic(optimizer_state="average", on_failure="continue"),
            "optimizer's state that is kept or reset",
        ),
        (lambda: Periodic(parse("ef21:compressor=topk"), on_failure="continue"), "cannot be handed"),
        (
            lambda: distcomp.streaming_diloco(period=8, fragments=4, overlap=2, on_failure="continue"),
            "overlap below period / fragments",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object], sentence: str) -> None:
    with pytest.raises(DistcompError, match=sentence):
        wrong()


def test_the_text_of_an_averaging_keeps_how_it_goes_on() -> None:
    text = "diloco:on_failure=(continue:quorum=3,grace_s=5)"
    averaging = parse(text)
    assert averaging.lateness == Lateness(quorum=3, grace_s=5.0)
    assert str(averaging) == text
    assert repr(parse(str(averaging))) == repr(averaging)
