"""Slabs cut, chosen from, and cut into chunks on a grid that each parameter begins anew."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.layout import Layout, Segment, chunk_views

from .strategies import grains, layouts


@given(layouts)
def test_parameters_lie_end_to_end(layout: Layout) -> None:
    slab = torch.arange(layout.numel)
    assert layout.numel == sum(math.prod(segment.shape) for segment in layout.segments)
    at = 0
    for (segment, piece), offset in zip(layout.pieces(slab), layout.offsets, strict=True):
        assert offset == at
        assert torch.equal(piece, torch.arange(at, at + segment.numel))
        assert piece.numel() == 0 or piece.data_ptr() == slab.data_ptr() + offset * slab.element_size()
        assert segment.whole
        at += segment.numel
    assert layout.names == tuple(segment.name for segment in layout.segments)


def test_a_scalar_is_one_element_and_roles_follow_dimensions() -> None:
    layout = Layout.of([("s", ()), ("b", (3,)), ("w", (2, 3)), ("e", (4, 2))], roles={"e": "embedding"})
    assert [segment.numel for segment in layout.segments] == [1, 3, 6, 8]
    assert [segment.role for segment in layout.segments] == ["bias", "bias", "matrix", "embedding"]


@given(layouts, st.integers(1, 9), grains)
def test_chunks_laid_end_to_end_are_the_slab(layout: Layout, parts: int, grain: int) -> None:
    slab = torch.arange(layout.numel)
    chunks = layout.split(parts, grain)
    assert len(chunks) == parts
    assert sum(chunk.numel for chunk in chunks) == layout.numel
    assert torch.equal(torch.cat([slab[:0], *chunk_views(slab, chunks)]), slab)
    elements = [
        (segment.name, segment.start + i)
        for chunk in chunks
        for segment in chunk.segments
        for i in range(segment.numel)
    ]
    assert elements == [(segment.name, i) for segment in layout.segments for i in range(segment.numel)]


@given(layouts, st.integers(1, 9), grains)
def test_no_block_is_cut_and_chunks_are_even_to_a_block(layout: Layout, parts: int, grain: int) -> None:
    chunks = layout.split(parts, grain)
    for chunk in chunks:
        for segment in chunk.segments:
            assert segment.start % grain == 0
            assert segment.stop % grain == 0 or segment.stop == math.prod(segment.shape)
            assert segment.numel > 0
    counts = [chunk.block_count(grain) for chunk in chunks]
    assert sum(counts) == layout.block_count(grain)
    assert max(counts) - min(counts) <= 1


@given(layouts, st.integers(1, 4), st.integers(1, 4), grains)
def test_a_chunk_may_be_cut_again(layout: Layout, first: int, second: int, grain: int) -> None:
    """Two levels (nodes, then workers of a node) cut on the same grid."""
    for chunk in layout.split(first, grain):
        finer = chunk.split(second, grain)
        assert sum(part.numel for part in finer) == chunk.numel
        assert all(segment.start % grain == 0 for part in finer for segment in part.segments)


@given(layouts)
def test_select_keeps_order_and_equal_layouts_are_one_key(layout: Layout) -> None:
    even = layout.select(lambda segment: segment.numel % 2 == 0)
    assert [s for s in layout.segments if s.numel % 2 == 0] == list(even.segments)
    again = Layout(layout.segments)
    assert (again, hash(again)) == (layout, hash(layout))


def test_a_piece_of_a_parameter_is_not_whole() -> None:
    assert Segment("w", (4, 2), 0, 8).whole
    assert not Segment("w", (4, 2), 0, 4).whole
    assert not Segment("w", (4, 2), 4, 4).whole
    assert Segment("w", (4, 2), 4, 4).stop == 8
    assert Segment("s", (), 0, 1).whole
    assert Segment("e", (0, 3), 0, 0).whole
