"""Workers in lock-step, layouts of odd shapes, and flat buffers of awkward numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from distcomp.layout import Layout
from distcomp.methods import AggregateResult, Method, StepContext
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep

SHAPES = [
    (),
    (1,),
    (0,),
    (3,),
    (511,),
    (512,),
    (513,),
    (7, 73),
    (40, 37),
    (8, 3, 3, 3),
    (2, 1, 3, 2, 1, 2, 2, 3),
    (3, 0, 2),
]
"""A scalar, empty ones, one short of a block and one past it, eight dimensions."""

TINY, HUGE = 1e-40, 1e30


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout.of([(f"p{i}", shape) for i, shape in enumerate(shapes)])


layouts = st.lists(st.sampled_from(SHAPES), max_size=4).map(lambda shapes: layout_of(*shapes))


def buffer(layout: Layout, seed: int, kind: str = "normal") -> Tensor:
    """Normal numbers; few among zeros; equal magnitudes; from denormals to 1e30; or nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(layout.numel, generator=generator)
    if kind == "sparse":
        x *= torch.rand(layout.numel, generator=generator) < 0.05
    elif kind == "ties":
        x = torch.randint(-2, 3, (layout.numel,), generator=generator).float()
    elif kind == "wide":
        x *= 10.0 ** torch.randint(-42, 30, (layout.numel,), generator=generator).double()
        x = x.float()
    elif kind == "zeros":
        x.zero_()
    return x


KINDS = ["normal", "sparse", "ties", "wide", "zeros"]
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**31)


class World:
    """A method among ``size`` workers, over as many steps as it is asked for."""

    def __init__(self, method: Method, size: int, layout: Layout, seed: int = 0) -> None:
        self.method, self.size, self.layout, self.seed = method, size, layout, seed
        self.net = Lockstep(size)
        self.states: list[Any] = [method.init(layout) for _ in range(size)]
        self.step = 0
        self.finite: list[bool] = []

    @property
    def shared(self) -> Key:
        return Key.of(self.seed, self.step)

    def aggregate(self, xs: Sequence[Tensor]) -> list[AggregateResult]:
        """One step; states are kept for the next."""
        aggregations = [
            Aggregation(
                self.method, x, state, StepContext(rank, self.size, self.layout, self.step, self.shared)
            )
            for rank, (x, state) in enumerate(zip(xs, self.states, strict=True))
        ]
        self.net.run(aggregations)
        results = [aggregation.result for aggregation in aggregations]
        assert all(result is not None for result in results)
        self.finite = [bool(aggregation.finite) for aggregation in aggregations]
        self.states = [result.state for result in results if result is not None]
        self.step += 1
        return [result for result in results if result is not None]

    def mean(self, xs: Sequence[Tensor]) -> np.ndarray:
        """One step; the estimate, which must be the same on all ranks and keep the law of contributions."""
        results = self.aggregate(xs)
        estimate = results[0].estimate
        assert all(torch.equal(result.estimate, estimate) for result in results)
        given = torch.stack([result.contribution() for result in results]).double()
        room = 1e-6 * float(given.abs().sum(0).max()) if estimate.numel() else 0.0
        assert np.allclose(given.sum(0), self.size * estimate.double(), rtol=0, atol=room)
        return estimate.numpy()

    @property
    def sent_bytes(self) -> list[int]:
        return [ledger.total_bytes for ledger in self.net.ledgers]


def once(method: Method, xs: Sequence[Tensor], layout: Layout, seed: int = 0) -> np.ndarray:
    return World(method, len(xs), layout, seed).mean(xs)
