"""A NaN or an infinity on one rank: every rank sees it, nobody keeps anything of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distcomp.compressors import Cast, Compressor, Identity
from distcomp.layout import Layout
from distcomp.methods import Partition, Warmup, from_compressor
from distcomp.methods.basic import PLAIN
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key
from tests.buffers import ODD, ORDINARY, alike, copied, draw, same_bits
from tests.conformance.subjects import Subject, methods
from tests.lockstep import converse, once

subjects = pytest.mark.parametrize("subject", methods(), ids=str)


def spoil(xs: list[torch.Tensor], layout: Layout, name: str, value: float) -> None:
    """Put ``value`` into the last element of one parameter on the last rank."""
    (piece,) = (piece for param, piece in layout.pieces(xs[-1]) if param.name == name)
    piece[-1] = value


@pytest.mark.parametrize("name", ORDINARY.names)
@subjects
def test_a_non_finite_value_reaches_every_rank_wherever_it_was(subject: Subject, name: str) -> None:
    method = subject.build()
    for value, size in ((math.nan, 3), (math.inf, 3), (-math.inf, 1)):
        xs = draw(size)
        spoil(xs, ORDINARY, name, value)
        round_ = once(method, xs)
        assert all(not estimate.isfinite().all() for estimate in round_.estimates), value
        assert method.propagates_nonfinite or not any(round_.finite), value


@subjects
def test_a_non_finite_value_reaches_every_rank_in_odd_shapes(subject: Subject) -> None:
    method = subject.build()
    for shape in ("scalar", "one short of a block", "many tiny", "only biases"):
        layout = ODD[shape]
        xs = draw(3, layout)
        spoil(xs, layout, layout.names[-1], math.nan)
        round_ = once(method, xs, layout)
        assert all(not estimate.isfinite().all() for estimate in round_.estimates), shape


@subjects
def test_a_step_with_a_nan_leaves_no_trace_once_its_state_is_dropped(subject: Subject) -> None:
    method = subject.build()
    before = once(method, draw(3)).states
    kept = [copied(state) for state in before]

    xs = draw(3, seed=1)
    spoil(xs, ORDINARY, ORDINARY.names[0], math.nan)
    converse(method, xs, before, step=1)
    assert all(alike(state, was) for state, was in zip(before, kept, strict=True))

    after = converse(method, draw(3, seed=2), before, step=1)
    never = converse(method, draw(3, seed=2), kept, step=1)
    assert same_bits(after.estimate, never.estimate)
    assert all(alike(a, b) for a, b in zip(after.states, never.states, strict=True))
    assert after.estimate.isfinite().all()


@dataclass(frozen=True)
class Clamped(Compressor):
    """A newcomer's: float16, with everything brought inside its range, what is not a number as well."""

    dtype: str = "fp16"

    summable = True

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", torch.float16, layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        payload["values"].copy_(x.nan_to_num(0.0).clamp(-6e4, 6e4))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        values = payload["values"].float()
        out.copy_(out + values if add else values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_compressor_that_declares_nothing_is_watched_whatever_its_fields_are_called(value: float) -> None:
    xs = draw(3)
    spoil(xs, ORDINARY, ORDINARY.names[0], value)
    round_ = once(from_compressor(Clamped()), xs)
    assert not any(round_.finite)
    assert all(not estimate.isfinite().all() for estimate in round_.estimates)


def test_what_is_made_of_parts_lets_through_what_all_of_them_do() -> None:
    through, watched = from_compressor(Cast("bf16")), from_compressor(Clamped())
    assert through.propagates_nonfinite
    assert not watched.propagates_nonfinite
    assert Partition(PLAIN, from_compressor(Identity()), through).propagates_nonfinite
    assert not Partition(PLAIN, through, watched).propagates_nonfinite
    assert not Warmup(through, 1, before=watched).propagates_nonfinite
    assert not Warmup(watched, 1).propagates_nonfinite
