"""Which elements are sent, how they are named, and what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.compressors import Chain, IndexCode, Quantize, RandomK, TopK
from distcomp.compressors.sparse import SAMPLED_FROM, rows_of, sample_indices, top_indices
from distcomp.layout import Layout, ParamSlice, chunk_views
from distcomp.randomness import Key
from tests.buffers import KINDS, buffer, kinds, layout_of, layouts, seeds
from tests.compressors import oracles

LONG = 4 * SAMPLED_FROM + 17


@st.composite
def index_sets(draw):
    universe = draw(st.sampled_from([1, 2, 7, 8, 100, 512, 4096, 70000]))
    count = draw(st.integers(0, min(universe, 400)))
    rows = draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    chosen = [np.sort(generator.choice(universe, count, replace=False)) for _ in range(rows)]
    return universe, count, torch.tensor(np.array(chosen), dtype=torch.int64).view(rows, count)


@given(index_sets())
def test_indices_come_back_from_their_code(one) -> None:
    universe, count, indices = one
    code = IndexCode(universe, count)
    sent = code.encode(indices)
    assert sent.shape == (len(indices), code.nbytes)
    assert torch.equal(code.decode(sent), indices)


@pytest.mark.parametrize("edge", ["first", "last", "both ends", "all but one"])
@pytest.mark.parametrize("universe", [2, 9, 4096, 65537])
def test_indices_at_the_edges_come_back(universe, edge) -> None:
    places = {
        "first": [0],
        "last": [universe - 1],
        "both ends": [0, universe - 1],
        "all but one": list(range(1, universe)) if universe < 5000 else list(range(0, universe, 2)),
    }[edge]
    indices = torch.tensor([places])
    code = IndexCode(universe, len(places))
    assert torch.equal(code.decode(code.encode(indices)), indices)


def test_indices_take_nine_bits_at_one_percent_and_never_more_than_a_bitmap_or_twelve_bits() -> None:
    for universe in (4096, 100_000, 10_000_000):
        count = universe // 100
        assert IndexCode(universe, count).nbytes * 8 / count < 9
        least = (
            math.lgamma(universe + 1) - math.lgamma(count + 1) - math.lgamma(universe - count + 1)
        ) / math.log(2)
        assert IndexCode(universe, count).nbytes * 8 < least + 0.7 * count + 32
    for count in (1, 41, 400, 1000, 4000):
        assert IndexCode(4096, count).nbytes <= min(512, -(-12 * count // 8) + 9)
    assert IndexCode(4096, 2048).width is None
    assert IndexCode(4096, 4096).nbytes == 0


def test_bytes_that_no_encoder_made_give_legal_indices() -> None:
    for universe, count in ((4096, 41), (4096, 2048), (1000, 3)):
        code = IndexCode(universe, count)
        for fill in (0, 255, 170):
            decoded = code.decode(torch.full((2, code.nbytes), fill, dtype=torch.uint8))
            assert decoded.shape == (2, count)
            assert int(decoded.min()) >= 0
            assert int(decoded.max()) < universe


@given(seeds, kinds, st.integers(1, 100), st.integers(1, 4))
def test_the_largest_are_found_and_ties_go_to_the_lower_index(seed, kind, length, rows) -> None:
    x = buffer(layout_of((rows, length)), seed, kind).view(rows, length)
    k = max(1, length // 3)
    expected = np.array([oracles.top(row, k) for row in x.numpy()])
    np.testing.assert_array_equal(top_indices(x, k).numpy(), expected)


@pytest.mark.parametrize("kind", [*KINDS, "in step", "constant"])
@pytest.mark.parametrize("k", [1, 300, LONG // 100, LONG // 2])
def test_the_sampled_threshold_finds_the_same(kind, k) -> None:
    """Also where the sample misleads: what is large only beside the sampled places, or nowhere."""
    x = buffer(layout_of((LONG,)), 3, kind if kind in KINDS else "normal")
    if kind == "in step":
        x[::61] *= 1000
    if kind == "constant":
        x.fill_(0.5)
    found = rows_of(layout_of((LONG,)), k / LONG, 0).largest(x)
    np.testing.assert_array_equal(found.numpy(), oracles.top(x.numpy(), k))


def test_a_nan_is_the_largest_of_all() -> None:
    x = torch.tensor([[1.0, float("inf"), float("nan"), -2.0]])
    assert top_indices(x, 2).tolist() == [[1, 2]]


@given(layouts, seeds, kinds, st.sampled_from([0.01, 0.3, 0.9]))
def test_top_k_sends_the_k_largest_of_each_parameter(layout, seed, kind, ratio) -> None:
    x = buffer(layout, seed, kind)
    compressor = TopK(ratio)
    found = compressor.decode(compressor.encode(x, layout, Key.of(0)), layout)
    for (_, v), (_, out) in zip(layout.pieces(x), layout.pieces(found), strict=True):
        v = v.numpy()
        np.testing.assert_array_equal(
            out.numpy(), oracles.kept(v, oracles.top(v, oracles.count(len(v), ratio)))
        )


@given(seeds, kinds, st.sampled_from([7, 64, 100]))
def test_top_k_of_chunks_sends_the_largest_of_each(seed, kind, chunk) -> None:
    layout = layout_of((333,), (5,), (0,), (128,))
    x = buffer(layout, seed, kind)
    compressor = TopK(0.2, chunk)
    found = compressor.decode(compressor.encode(x, layout, Key.of(0)), layout)
    for (_, v), (_, out) in zip(layout.pieces(x), layout.pieces(found), strict=True):
        for start in range(0, len(v), chunk):
            part = v[start : start + chunk].numpy()
            expected = oracles.kept(part, oracles.top(part, oracles.count(len(part), 0.2)))
            np.testing.assert_array_equal(out[start : start + chunk].numpy(), expected)


@pytest.mark.parametrize(
    "compressor", [TopK(0.2, chunk=16), Chain(TopK(0.2, chunk=16)), TopK(0.2), RandomK(0.2)], ids=repr
)
def test_a_slab_cut_at_its_grain_keeps_every_value(compressor) -> None:
    layout = layout_of((100,), (33,), (7,))
    x, key = buffer(layout, 4), Key.of(9)
    whole = compressor.decode(compressor.encode(x, layout, key), layout)
    chunks = layout.split(3, compressor.alignment)
    parts = [
        compressor.decode(compressor.encode(view, chunk, key), chunk)
        for view, chunk in zip(chunk_views(x, chunks), chunks, strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_values_ride_through_any_quantizer() -> None:
    """The chain is the quantizer on the values that the sparsifier chose, and costs what the two cost."""
    layout = layout_of((1000,), (50,))
    x, key = buffer(layout, 1), Key.of(3)
    first, second = TopK(0.1), Quantize(8, rounding="nearest")
    chain = Chain(first, second)
    values = first.encode(x, layout, key)["values"]
    kept = first.kept(layout)
    rounded = second.decode(second.encode(values, kept, key), kept)
    decoded = chain.decode(chain.encode(x, layout, key), layout)
    np.testing.assert_array_equal(decoded[decoded != 0], rounded[rounded != 0])
    assert kept.numel == 105
    indices = IndexCode(1000, 100).nbytes + IndexCode(50, 5).nbytes
    assert sum(part.nbytes for part in chain.parts(layout)) == 105 + 2 * 4 + indices


def test_sparse_payloads_are_a_small_part_of_what_they_stand_for() -> None:
    layout = layout_of((1000, 1000))
    dense = 4_000_000
    assert dense / TopK(0.01).wire_bytes(layout) > 78
    assert dense / Chain(TopK(0.01), Quantize(8)).wire_bytes(layout) > 190
    assert dense / TopK(0.01, chunk=4096).wire_bytes(layout) > 77
    assert RandomK(0.01).wire_bytes(layout) == 32 + 8 + 40_000


@pytest.mark.parametrize("numel", [1, 2, 3, 100, SAMPLED_FROM, SAMPLED_FROM + 1, 3 * SAMPLED_FROM])
def test_random_places_are_different_and_in_range(numel) -> None:
    for count in {1, numel // 2, numel} - {0}:
        places = sample_indices(numel, count, Key.of(count))
        assert len(set(places.tolist())) == count
        assert int(places.min()) >= 0
        assert int(places.max()) < numel
    assert sample_indices(0, 0, Key.of(0)).numel() == 0


@pytest.mark.parametrize("numel", [5, SAMPLED_FROM + 5000])
def test_every_place_is_equally_likely(numel) -> None:
    """Chi-square over cells of equal size: its mean is the cells less one, its deviation sqrt(2 cells)."""
    cells, draws, count = 5, 200, max(1, numel // 1000)
    seen = np.zeros(cells)
    for draw in range(draws):
        places = sample_indices(numel, count, Key.of("uniform", draw)).numpy()
        seen += np.bincount(places * cells // numel, minlength=cells)
    share = np.bincount(np.arange(numel) * cells // numel, minlength=cells) / numel
    expected = draws * count * share
    assert ((seen - expected) ** 2 / expected).sum() < 4 + 5 * 8**0.5


def test_other_keys_draw_other_places_and_the_same_key_the_same() -> None:
    layout = layout_of((1000,), (1000,))
    drawn = RandomK(0.1).drawn(layout, Key.of(1))
    assert torch.equal(drawn, RandomK(0.1).drawn(layout, Key.of(1)))
    assert not torch.equal(drawn, RandomK(0.1).drawn(layout, Key.of(2)))
    assert not torch.equal(drawn[:100], drawn[100:] - 1000)


def test_a_piece_of_a_parameter_is_a_parameter_of_its_own_to_top_k() -> None:
    layout = Layout((ParamSlice("w", (10, 10), 30, 40),))
    x = buffer(layout, 2)
    decoded = TopK(0.1).decode(TopK(0.1).encode(x, layout, Key.of(0)), layout)
    np.testing.assert_array_equal(decoded.numpy(), oracles.kept(x.numpy(), oracles.top(x.numpy(), 4)))
