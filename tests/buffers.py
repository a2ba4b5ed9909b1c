"""Layouts of odd shapes, flat buffers of ordinary and awkward numbers, and states compared to the bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import PerParameter, State, cut_state, map_state

ORDINARY = Layout.of(
    [("fc.weight", (40, 37)), ("fc.bias", (37,)), ("conv.weight", (8, 3, 3, 3)), ("norm.weight", (8,))],
    roles={"norm.weight": "norm"},
)
"""Several blocks, a short last one, roles of both kinds: big enough to be cut, small enough to be quick."""

ODD = {
    "nothing": Layout.of([]),
    "empty": Layout.of([("e", (0,)), ("w", (4, 5)), ("f", (3, 0))]),
    "only empty": Layout.of([("e", (0, 4))]),
    "scalar": Layout.of([("s", ()), ("t", ())]),
    "one short of a block": Layout.of([("w", (7, 73)), ("b", (511,))]),
    "one past a block": Layout.of([("w", (27, 19)), ("b", (513,))]),
    "eight dimensions": Layout.of([("w", (2, 1, 3, 2, 1, 2, 2, 3))]),
    "many tiny": Layout.of([(f"p{i}", (3,) if i % 3 else (1, 2)) for i in range(40)]),
    "only biases": Layout.of([("a", (9,)), ("b", (4,))]),
    "one value": Layout.of([("w", (1, 1))]),
}

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


def draw(size: int, layout: Layout = ORDINARY, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """One random flat buffer per worker: each parameter with a magnitude of its own, as gradients have."""
    generator = torch.Generator().manual_seed(1000 * seed + size)
    buffers = []
    for _ in range(size):
        buffer = torch.randn(layout.numel, generator=generator)
        for index, (_, piece) in enumerate(layout.pieces(buffer)):
            piece.mul_(scale * 3.0 ** -(index % 4))
        buffers.append(buffer)
    return buffers


def slab_of(named: dict[str, Tensor], layout: Layout) -> Tensor:
    return torch.cat([named[name] for name in layout.names]) if layout.names else torch.empty(0)


def by_name(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {param.name: piece for param, piece in layout.pieces(buffer)}


def groups(layout: Layout, *cuts: Iterable[int]) -> list[Layout]:
    """Layouts of the segments with these indices."""
    return [Layout(tuple(layout.slices[index] for index in cut)) for cut in cuts]


def tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of a state by a flat name."""
    return {
        f"{name}/{path}": value for name, leaves in cut_state(state).items() for path, value in leaves.items()
    }


def alike(one: State, other: State) -> bool:
    """Whether two states hold the same bits (a NaN equals itself)."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
    )


def copied(state: State) -> dict[str, Any]:
    """A state that shares no memory with the one given."""
    return map_state(
        state,
        lambda _, leaf: FlatBuffer(leaf.data.clone(), leaf.layout),
        lambda _, leaf: PerParameter({name: value.clone() for name, value in leaf.items()}),
    )
