"""What is being sent: which parameter lies where in a flat tensor.

A *slab* is a flat tensor; its :class:`Layout` is the frozen record of the parameters in it. State is keyed by
parameter name, never by bucket index, because DistributedDataParallel rebuilds its buckets after the first
step. Blocks (of a quantizer, of a sparsifier) lie on a grid that starts at element 0 of each parameter, so
that cutting or regrouping a slab changes no value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A piece of one parameter: elements ``start`` to ``start + numel`` of it, flattened."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole parameter, also when the segment is only a piece of it."""
    start: int
    numel: int
    role: str = "matrix"
    """``matrix`` (two dimensions or more), ``bias`` (one or none), ``norm`` or ``embedding``."""

    @property
    def stop(self) -> int:
        return self.start + self.numel

    @property
    def whole(self) -> bool:
        """Whether the segment is the whole parameter (matrix methods need that)."""
        total = 1
        for side in self.shape:
            total *= side
        return self.start == 0 and self.numel == total


@dataclass(frozen=True)
class Layout:
    """The parameters of a slab, in order."""

    segments: tuple[Segment, ...]

    @staticmethod
    def of(
        named_shapes: Iterable[tuple[str, tuple[int, ...]]], roles: dict[str, str] | None = None
    ) -> Layout:
        """The layout of whole parameters laid end to end."""
        segments = []
        for name, shape in named_shapes:
            numel = 1
            for side in shape:
                numel *= side
            role = (roles or {}).get(name) or ("matrix" if len(shape) >= 2 else "bias")
            segments.append(Segment(name, tuple(shape), 0, numel, role))
        return Layout(tuple(segments))

    @cached_property
    def numel(self) -> int:
        return sum(segment.numel for segment in self.segments)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each segment begins in the slab."""
        offsets, at = [], 0
        for segment in self.segments:
            offsets.append(at)
            at += segment.numel
        return tuple(offsets)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(segment.name for segment in self.segments)

    def pieces(self, slab: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """Each segment with its view of the slab."""
        for segment, at in zip(self.segments, self.offsets, strict=True):
            yield segment, slab[at : at + segment.numel]

    def select(self, keep: Callable[[Segment], bool]) -> Layout:
        """The layout of the segments that ``keep`` accepts."""
        return Layout(tuple(segment for segment in self.segments if keep(segment)))

    def block_count(self, grain: int) -> int:
        """How many blocks of ``grain`` elements cover the slab, each parameter beginning a new one."""
        return sum(-(-segment.numel // grain) for segment in self.segments)

    def split(self, parts: int, grain: int) -> tuple[Layout, ...]:
        """Cut into consecutive chunks of nearly equal numbers of blocks; no block is cut.

        The chunks laid end to end are the slab, so chunk *i* of a slab is a view of it. Chunks may be empty.
        """
        key = (parts, grain)
        if key not in self._splits:
            self._splits[key] = tuple(_split(self.segments, parts, grain))
        return self._splits[key]

    @cached_property
    def _splits(self) -> dict[tuple[int, int], tuple[Layout, ...]]:
        return {}

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.segments)


def _split(segments: tuple[Segment, ...], parts: int, grain: int) -> Iterator[Layout]:
    blocks = sum(-(-segment.numel // grain) for segment in segments)
    bounds = [blocks * i // parts for i in range(parts + 1)]
    for low, high in itertools.pairwise(bounds):
        chunk, first = [], 0
        for segment in segments:
            count = -(-segment.numel // grain)
            a, b = max(low, first) - first, min(high, first + count) - first
            if a < b:
                start, stop = a * grain, min(b * grain, segment.numel)
                chunk.append(
                    Segment(segment.name, segment.shape, segment.start + start, stop - start, segment.role)
                )
            first += count
        yield Layout(tuple(chunk))


def chunk_views(slab: Tensor, chunks: Iterable[Layout]) -> list[Tensor]:
    """The views of a slab that belong to its chunks."""
    views, at = [], 0
    for chunk in chunks:
        views.append(slab[at : at + chunk.numel])
        at += chunk.numel
    return views


@dataclass(frozen=True, eq=False)
class Slab:
    """A flat tensor and the record of what lies where in it."""

    data: Tensor
    layout: Layout
