"""What is being sent: which parameter lies where in a flat tensor.

A *flat buffer* is a flat tensor; its :class:`Layout` is the frozen record of the parameters in it. State is
keyed by parameter name, never by bucket index, because DistributedDataParallel rebuilds its buckets after the
first step. Blocks (of a quantizer, of a sparsifier) lie on a grid that starts at element 0 of each parameter,
so that cutting or regrouping a flat buffer changes no value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ParamSlice:
    """A piece of one parameter: elements ``start`` to ``start + numel`` of it, flattened."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole parameter, also where the slice is only a piece of it."""
    start: int
    numel: int
    role: str = "matrix"
    """``matrix`` (two dimensions or more), ``bias`` (one or none), ``norm`` or ``embedding``."""

    @property
    def stop(self) -> int:
        """Where it ends in the parameter."""
        return self.start + self.numel

    @property
    def whole(self) -> bool:
        """Whether the slice is the whole parameter (matrix methods need that)."""
        total = 1
        for side in self.shape:
            total *= side
        return self.start == 0 and self.numel == total


@dataclass(frozen=True)
class Layout:
    """The parameters of a flat buffer, in order."""

    slices: tuple[ParamSlice, ...]

    @staticmethod
    def of(
        named_shapes: Iterable[tuple[str, tuple[int, ...]]], roles: dict[str, str] | None = None
    ) -> Layout:
        """The layout of whole parameters laid end to end."""
        slices = []
        for name, shape in named_shapes:
            numel = 1
            for side in shape:
                numel *= side
            role = (roles or {}).get(name) or ("matrix" if len(shape) >= 2 else "bias")
            slices.append(ParamSlice(name, tuple(shape), 0, numel, role))
        return Layout(tuple(slices))

    @cached_property
    def numel(self) -> int:
        """Elements of the flat buffer."""
        return sum(param.numel for param in self.slices)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each slice begins in the flat buffer."""
        offsets, at = [], 0
        for param in self.slices:
            offsets.append(at)
            at += param.numel
        return tuple(offsets)

    @cached_property
    def sizes(self) -> list[int]:
        """How many elements each slice has."""
        return [param.numel for param in self.slices]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in order."""
        return tuple(param.name for param in self.slices)

    def pieces(self, buffer: Tensor) -> Iterator[tuple[ParamSlice, Tensor]]:
        """Each slice with its view of the flat buffer."""
        yield from zip(self.slices, torch.split(buffer[: self.numel], self.sizes), strict=True)

    def select(self, keep: Callable[[ParamSlice], bool]) -> Layout:
        """The layout of the slices that ``keep`` accepts."""
        return Layout(tuple(param for param in self.slices if keep(param)))

    def block_count(self, alignment: int) -> int:
        """How many blocks of ``alignment`` elements cover the flat buffer, each parameter beginning a new
        one."""
        return sum(-(-param.numel // alignment) for param in self.slices)

    def within(self, block: int) -> int:
        """The block, cut to the longest parameter: beyond that it would be padding, in each of them."""
        return min(block, max([1, *self.sizes]))

    def split(self, parts: int, alignment: int) -> tuple[Layout, ...]:
        """Cut into consecutive chunks of nearly equal numbers of blocks; no block is cut.

        The chunks laid end to end are the flat buffer, so chunk *i* of a flat buffer is a view of it. Chunks
        may be empty.
        """
        return self.remember(
            ("split", parts, alignment), lambda: tuple(_split(self.slices, parts, alignment))
        )

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` made of this layout when ``key`` first asked: a step must not count its parameters
        anew."""
        if key not in self._remembered:
            self._remembered[key] = make()
        made: T = self._remembered[key]
        return made

    @cached_property
    def _remembered(self) -> dict[Hashable, Any]:
        return {}

    def __hash__(self) -> int:
        return self._hash  # kept: a layout is looked up several times a step, and has hundreds of slices

    @cached_property
    def _hash(self) -> int:
        return hash(self.slices)


def _split(slices: tuple[ParamSlice, ...], parts: int, alignment: int) -> Iterator[Layout]:
    # Blocks are dealt out, not elements: a chunk's bounds then lie on every parameter's own grid.
    blocks = sum(-(-param.numel // alignment) for param in slices)
    bounds = [blocks * i // parts for i in range(parts + 1)]
    for low, high in itertools.pairwise(bounds):
        chunk, first = [], 0
        for param in slices:
            count = -(-param.numel // alignment)
            a, b = max(low, first) - first, min(high, first + count) - first
            if a < b:
                start, stop = a * alignment, min(b * alignment, param.numel)
                chunk.append(
                    ParamSlice(param.name, param.shape, param.start + start, stop - start, param.role)
                )
            first += count
        yield Layout(tuple(chunk))


def chunk_views(buffer: Tensor, chunks: Iterable[Layout]) -> list[Tensor]:
    """The views of a flat buffer that belong to its chunks."""
    views, at = [], 0
    for chunk in chunks:
        views.append(buffer[at : at + chunk.numel])
        at += chunk.numel
    return views


def chunk_view(buffer: Tensor, chunks: Sequence[Layout], index: int) -> Tensor:
    """One of :func:`chunk_views`."""
    begin = 0
    for chunk in chunks[:index]:
        begin += chunk.numel
    return buffer[begin : begin + chunks[index].numel]


@dataclass(frozen=True, eq=False)
class FlatBuffer:
    """A flat tensor and the record of what lies where in it."""

    data: Tensor
    layout: Layout

    @property
    def held_bytes(self) -> int:
        """What it takes in memory."""
        return self.data.numel() * self.data.element_size()
