"""A closer look at any step: by parameter, what was left out of what was to be sent, and what is owed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pytest
import torch

from distcomp.attaching.details import looked_at
from distcomp.methods import parse
from distcomp.methods.base import State, StepContext
from distcomp.randomness import Key
from distcomp.registry import METHODS
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep
from tests.buffers import ORDINARY

RANKS = 2
SPECS = sorted(name for name, entry in METHODS.items() if entry.kind == "gradient")
SPECS += [
    "topk:ratio=1.0",
    "random_k:ratio=0.1,values=int4",
    "random_k:ratio=0.1,values=(qsgd:bits=1)",  # a residual of the values that were drawn
    "qsgd:bits=1",
    "qsgd:bits=4,error_feedback=true",
]


def steps(spec: str, count: int) -> Aggregation:
    """The last of some steps, on rank 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that are known to be coarse
        method = parse(spec)
    states: Sequence[State] = [method.init(ORDINARY) for _ in range(RANKS)]
    net = Lockstep(RANKS)
    for step in range(count):
        exchanges = [
            Aggregation(
                method, gradient(rank, step), state, StepContext(rank, RANKS, ORDINARY, step, Key.of(0, step))
            )
            for rank, state in enumerate(states)
        ]
        states = [result.state for result in in_lock_step(net, exchanges)]
    return exchanges[0]


def gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(ORDINARY.numel, generator=torch.Generator().manual_seed(1 + rank + RANKS * step))


@pytest.mark.parametrize("spec", SPECS)
def test_any_method_can_be_looked_at(spec: str) -> None:
    found = looked_at(steps(spec, 2), gradient(0, 1), parse(spec), RANKS)
    assert list(found) == list(ORDINARY.names)
    for param, one in zip(ORDINARY.slices, found.values(), strict=True):
        assert one["numel"] == param.numel
        assert None not in (one["gradient_norm"], one["residual_norm"], one["error"])
        assert one["payload_bytes"] >= 0


@pytest.mark.parametrize(
    "spec", ["topk:ratio=0.1", "topk:ratio=0.1,pattern=reduce_scatter", "powersgd:rank=1"]
)
def test_what_is_owed_lies_where_its_parameter_does(spec: str) -> None:
    """Biases and norms ride along in float32, and owe nothing; of the rest what was left out is owed."""
    first = looked_at(steps(spec, 1), gradient(0, 0), parse(spec), RANKS)
    later = looked_at(steps(spec, 2), gradient(0, 1), parse(spec), RANKS)
    for param in ORDINARY.slices:
        one, two = first[param.name], later[param.name]
        if param.role != "matrix":
            assert one["residual_norm"] == two["residual_norm"] == one["error"] == two["error"] == 0
            continue
        assert one["residual_norm"] > 0
        assert one["error"] == pytest.approx(one["residual_norm"] / one["gradient_norm"], rel=1e-4)
        # what was owed is to be sent, too: its share in v
        assert two["error"] > 0
        v = two["residual_norm"] / two["error"]
        both = math.hypot(two["gradient_norm"], one["residual_norm"])
        assert v == pytest.approx(both, rel=0.25)
        assert v > 1.05 * two["gradient_norm"]
