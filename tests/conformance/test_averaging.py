"""What every registered averaging keeps to, whatever it is: purity, agreement, the same bits when resumed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from distcomp.averaging.base import Averaging, FragmentState, gather
from distcomp.averaging.workers import Workers
from distcomp.layout import Layout
from distcomp.methods import METHODS, Entry, parse
from distcomp.methods.base import cut_state, join_state
from distcomp.registry import load_all
from distcomp.runtime.driver import in_lock_step
from tests.buffers import alike, copied
from tests.conformance.test_state import through_a_file

load_all()
SIZE = 4
LAYOUT = Layout.of([("a", (24, 20)), ("bias", (20,)), ("c", (20, 6))], {"bias": "bias"})
NAMES = sorted(name for name, entry in METHODS.items() if entry.kind in ("periodic", "gossip"))

names = pytest.mark.parametrize("name", NAMES)


def built(name: str) -> Any:
    """At its defaults, with a period of 2 where it has one."""
    entry: Entry = METHODS[name]
    return entry.recipe(**({"period": 2} if "period" in inspect.signature(entry.recipe).parameters else {}))


def start() -> torch.Tensor:
    return torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(1))


def trained(workers: Workers, steps: int) -> None:
    """Every worker goes its own way; the same in the same step."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(100 + workers.steps)
        workers.stacked += 0.1 * torch.randn(workers.stacked.shape, generator=generator)
        workers.step()


@names
def test_its_text_makes_its_equal(name: str) -> None:
    averaging = built(name)
    assert parse(str(averaging)) == averaging
    assert repr(parse(str(averaging))) == repr(averaging)


@names
@pytest.mark.parametrize("steps", [3, 4])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(name: str, steps: int) -> None:
    through = Workers(built(name), start(), SIZE, LAYOUT)
    trained(through, steps)
    again = Workers(built(name), start(), SIZE, LAYOUT)
    again.steps = through.steps
    again.stacked.copy_(through.stacked)
    for fragments, fresh in zip(through.fragments, again.fragments, strict=True):
        for fragment, other in zip(fragments, fresh, strict=True):
            other.state = join_state(through_a_file(cut_state(fragment.state)), other.state)
            other.last, other.exchanges = fragment.last, fragment.exchanges
            other.in_flight = fragment.in_flight
    trained(through, 6)
    trained(again, 6)
    assert torch.equal(through.stacked, again.stacked)


@names
def test_neither_the_model_nor_the_state_is_changed_by_an_exchange(name: str) -> None:
    workers = Workers(built(name), start(), SIZE, LAYOUT)
    trained(workers, 5)
    for number in range(len(workers.fragments[0])):
        fragments = [of_rank[number] for of_rank in workers.fragments]
        models = [_own(workers, rank, fragment) for rank, fragment in enumerate(fragments)]
        kept = [model.clone() for model in models]
        states = [fragment.state for fragment in fragments]
        before = [copied(state) for state in states]
        aggregations = [
            replace(fragment).aggregate(model, 7, 0)
            for fragment, model in zip(fragments, models, strict=True)
        ]
        in_lock_step(workers.net, aggregations)
        assert all(torch.equal(one, other) for one, other in zip(models, kept, strict=True))
        assert all(alike(one, other) for one, other in zip(states, before, strict=True))


def _own(workers: Workers, rank: int, fragment: FragmentState) -> torch.Tensor:
    views = {param.name: piece for param, piece in LAYOUT.pieces(workers.models[rank])}
    return gather(views, fragment.layout)


@names
def test_the_mean_of_models_that_nobody_trains_stays_where_it_is(name: str) -> None:
    workers = Workers(built(name), start(), SIZE, LAYOUT)
    for _ in range(8):
        workers.step()
    torch.testing.assert_close(workers.mean, start(), atol=0.01, rtol=0)


@names
def test_workers_stay_together_and_the_global_generator_is_left_alone(name: str) -> None:
    """Two hundred random steps of a tenth: alone, the mean square of their distances would be 1.5."""
    workers = Workers(built(name), start(), SIZE, LAYOUT)
    at = torch.get_rng_state()
    trained(workers, 200)
    assert torch.equal(torch.get_rng_state(), at)
    assert workers.stacked.isfinite().all()
    assert workers.spread < 1.3


def test_every_one_of_them_is_an_averaging() -> None:
    for name in NAMES:
        assert all(isinstance(level, Averaging) for level in built(name).levels())
