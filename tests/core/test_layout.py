"""Flat buffers cut, chosen from, and cut into chunks on a grid that each parameter begins anew."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.layout import Layout, ParamSlice, chunk_views
from tests.core.strategies import grains, layouts


@given(layouts)
def test_parameters_lie_end_to_end(layout: Layout) -> None:
    buffer = torch.arange(layout.numel)
    assert layout.numel == sum(math.prod(param.shape) for param in layout.slices)
    at = 0
    for (param, piece), offset in zip(layout.pieces(buffer), layout.offsets, strict=True):
        assert offset == at
        assert torch.equal(piece, torch.arange(at, at + param.numel))
        assert piece.numel() == 0 or piece.data_ptr() == buffer.data_ptr() + offset * buffer.element_size()
        assert param.whole
        at += param.numel
    assert layout.names == tuple(param.name for param in layout.slices)


def test_a_scalar_is_one_element_and_roles_follow_dimensions() -> None:
    layout = Layout.of([("s", ()), ("b", (3,)), ("w", (2, 3)), ("e", (4, 2))], roles={"e": "embedding"})
    assert [param.numel for param in layout.slices] == [1, 3, 6, 8]
    assert [param.role for param in layout.slices] == ["bias", "bias", "matrix", "embedding"]


@given(layouts, st.integers(1, 9), grains)
def test_chunks_laid_end_to_end_are_the_slab(layout: Layout, parts: int, alignment: int) -> None:
    buffer = torch.arange(layout.numel)
    chunks = layout.split(parts, alignment)
    assert len(chunks) == parts
    assert sum(chunk.numel for chunk in chunks) == layout.numel
    assert torch.equal(torch.cat([buffer[:0], *chunk_views(buffer, chunks)]), buffer)
    elements = [
        (param.name, param.start + i)
        for chunk in chunks
        for param in chunk.slices
        for i in range(param.numel)
    ]
    assert elements == [(param.name, i) for param in layout.slices for i in range(param.numel)]


@given(layouts, st.integers(1, 9), grains)
def test_no_block_is_cut_and_chunks_are_even_to_a_block(layout: Layout, parts: int, alignment: int) -> None:
    chunks = layout.split(parts, alignment)
    for chunk in chunks:
        for param in chunk.slices:
            assert param.start % alignment == 0
            assert param.stop % alignment == 0 or param.stop == math.prod(param.shape)
            assert param.numel > 0
    counts = [chunk.block_count(alignment) for chunk in chunks]
    assert sum(counts) == layout.block_count(alignment)
    assert max(counts) - min(counts) <= 1


@given(layouts, st.integers(1, 4), st.integers(1, 4), grains)
def test_a_chunk_may_be_cut_again(layout: Layout, first: int, second: int, alignment: int) -> None:
    """Two levels (nodes, then workers of a node) cut on the same grid."""
    for chunk in layout.split(first, alignment):
        finer = chunk.split(second, alignment)
        assert sum(part.numel for part in finer) == chunk.numel
        assert all(param.start % alignment == 0 for part in finer for param in part.slices)


@given(layouts)
def test_select_keeps_order_and_equal_layouts_are_one_key(layout: Layout) -> None:
    even = layout.select(lambda param: param.numel % 2 == 0)
    assert [s for s in layout.slices if s.numel % 2 == 0] == list(even.slices)
    again = Layout(layout.slices)
    assert (again, hash(again)) == (layout, hash(layout))


def test_a_piece_of_a_parameter_is_not_whole() -> None:
    assert ParamSlice("w", (4, 2), 0, 8).whole
    assert not ParamSlice("w", (4, 2), 0, 4).whole
    assert not ParamSlice("w", (4, 2), 4, 4).whole
    assert ParamSlice("w", (4, 2), 4, 4).stop == 8
    assert ParamSlice("s", (), 0, 1).whole
    assert ParamSlice("e", (0, 3), 0, 0).whole
