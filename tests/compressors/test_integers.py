"""Integers that add on the wire: exact in any order, and the methods that ride on it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.collectives import AllGather, AllReduce
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.methods import (
    HomomorphicQuantizer,
    RandomHadamard,
    TernGrad,
    from_compressor,
    shared_range,
    terngrad,
)
from distcomp.methods.integers import field_bits, hadamard, pack_fields, unpack_fields, word_count
from distcomp.randomness import Key
from tests.buffers import buffer, kinds, layout_of, layouts, seeds
from tests.compressors import oracles
from tests.lockstep import World


@st.composite
def integers(draw):
    bits, size = draw(st.integers(2, 32)), draw(st.integers(1, 6))
    largest = ((1 << (bits - 1)) - 1) // size
    numel = draw(st.integers(0, 40))
    row = st.lists(st.integers(-largest, largest), min_size=numel, max_size=numel)
    return bits, [draw(row) for _ in range(size)]


@given(integers())
def test_sums_of_packed_integers_are_the_packed_sums_in_any_order(one) -> None:
    """Every partial sum too: none leaves its field, or the word."""
    bits, rows = one
    numel = len(rows[0])
    words = [pack_fields(torch.tensor(row, dtype=torch.int32), bits) for row in rows]
    assert [word.tolist() for word in words] == [oracles.Fields.pack(row, bits) for row in rows]
    assert all(word.numel() == word_count(numel, bits) for word in words)
    for order in itertools.islice(itertools.permutations(range(len(rows))), 4):
        total, exact = torch.zeros_like(words[0]), np.zeros(numel, dtype=np.int64)
        for rank in order:
            total, exact = total + words[rank], exact + np.array(rows[rank], dtype=np.int64)
            assert unpack_fields(total, numel, bits).tolist() == exact.tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 255, 256])
@pytest.mark.parametrize("largest", [1, 7, 127])
def test_a_field_holds_the_largest_sum_and_no_more_than_one_bit_too_many(size, largest) -> None:
    bits = field_bits(largest, size)
    assert size * largest <= 2 ** (bits - 1) - 1 < 2 * size * largest + 1


@given(layouts, seeds, kinds, st.sampled_from([2, 4, 8, 16]), st.sampled_from([1, 2, 3, 4]))
def test_a_shared_range_follows_its_equation(layout, seed, kind, bits, size) -> None:
    """r = the ranks' maximum of a block, rounded up to a bfloat16; q = floor(s x/r + u); integers add."""
    block, method = 64, HomomorphicQuantizer(bits, 64)
    world = World(method, size, layout, seed)
    xs = [buffer(layout, seed + rank, kind) for rank in range(size)]
    shared, s = world.shared, method.levels(size)
    estimate = world.mean(xs)
    at = 0
    us = [oracles.noise(layout, shared.fold("rank", rank).fold("round")) for rank in range(size)]
    for param in layout.slices:
        for start in range(0, param.numel, block):
            part = slice(at + start, at + min(start + block, param.numel))
            r = np.float32(max(np.abs(x.numpy()[part]).max() for x in xs))
            r = ((r.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
            if r < 2.0**-120:
                assert not estimate[part].any()
                continue
            factor = np.float32(s) / r
            total = sum(
                np.clip(np.floor((x.numpy()[part] * factor).astype(np.float64) + u[part]), -s, s)
                for x, u in zip(xs, us, strict=True)
            )
            np.testing.assert_allclose(estimate[part], total * np.float64(r) / s / size, rtol=1e-6)
        at += param.numel


@pytest.mark.parametrize(
    ("bits", "size", "width"), [(4, 2, 5), (4, 4, 6), (4, 8, 8), (4, 16, 8), (8, 2, 10), (2, 2, 3)]
)
def test_the_width_counts_head_room_and_wastes_no_field(bits, size, width) -> None:
    method = HomomorphicQuantizer(bits)
    assert method.width(size) >= field_bits(2 ** (bits - 1) - 1, size)
    assert 32 // method.width(size) == 32 // width
    assert method.levels(size) >= 2 ** (bits - 1) - 1
    assert size * method.levels(size) <= 2 ** (method.width(size) - 1) - 1


@pytest.mark.parametrize(
    "method",
    [
        HomomorphicQuantizer(4),
        HomomorphicQuantizer(8, 64),
        TernGrad(0.0),
        RandomHadamard(HomomorphicQuantizer(4, 64), 64),
    ],
    ids=repr,
)
def test_sums_of_integers_are_unbiased(method) -> None:
    layout, size, draws = layout_of((30, 10)), 3, 120
    xs = [buffer(layout, rank) for rank in range(size)]
    world = World(method, size, layout)
    drawn = np.stack([world.mean(xs) for _ in range(draws)]).astype(np.float64)
    error = drawn - torch.stack(xs).double().mean(0).numpy()
    assert np.square(error.mean(0)).sum() <= 2 * np.square(error).sum(1).mean() / draws


def test_the_error_of_a_shared_range_is_what_it_declares() -> None:
    layout, size = layout_of((2048,)), 4
    xs = [buffer(layout, rank) for rank in range(size)]
    world = World(HomomorphicQuantizer(4, 512), size, layout)
    errors = [np.square(world.mean(xs) - torch.stack(xs).mean(0).numpy()).mean() for _ in range(20)]
    s = HomomorphicQuantizer(4).levels(size)
    r = max(float(x.abs().max()) for x in xs) * 1.01
    assert np.mean(errors) <= (r / s) ** 2 / (4 * size)


@given(seeds, kinds, st.sampled_from([0.0, 2.5, 0.5]), st.sampled_from([1, 2, 3, 4, 8]))
def test_terngrad_follows_the_paper(seed, kind, clip, size) -> None:
    layout = layout_of((40, 5), (), (9,), (0,))
    world = World(TernGrad(clip), size, layout, seed)
    xs = [buffer(layout, seed + rank, kind) for rank in range(size)]
    shared = world.shared
    estimate = world.mean(xs)
    us = [oracles.noise(layout, shared.fold("rank", rank).fold("round")) for rank in range(size)]
    at = 0
    for param in layout.slices:
        part = slice(at, at + param.numel)
        gs = [
            x.numpy()[part] if not clip else oracles.clip_deviations(x.numpy()[part], clip).astype(np.float32)
            for x in xs
        ]
        s = max((float(np.abs(g).max()) for g in gs if g.size), default=0.0)
        s = s if s >= 2.0**-120 else 0.0
        total = sum(oracles.ternary(g, s, u[part]) for g, u in zip(gs, us, strict=True))
        wrong = ~np.isclose(estimate[part], s * total / size, rtol=1e-6, atol=0)
        assert wrong.sum() <= 1  # a deviation that rounds otherwise may move one edge
        at += param.numel


@given(st.integers(0, 9), seeds)
def test_the_hadamard_transform_is_orthonormal_and_its_own_inverse(power, seed) -> None:
    side = 2**power
    rows = buffer(layout_of((3, side)), seed).view(3, side)
    turned = hadamard(rows)
    np.testing.assert_allclose(hadamard(turned), rows, rtol=0, atol=1e-5)
    np.testing.assert_allclose(turned.norm(dim=1), rows.norm(dim=1), rtol=1e-5)
    if side == 4:
        matrix = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
        np.testing.assert_allclose(turned, rows.numpy() @ matrix, rtol=1e-5, atol=1e-6)


@given(layouts, seeds)
def test_a_rotation_around_the_exact_mean_is_the_exact_mean(layout, seed) -> None:
    xs = [buffer(layout, seed + rank) for rank in range(3)]
    estimate = World(RandomHadamard(from_compressor(Identity()), 64), len(xs), layout).mean(xs)
    np.testing.assert_allclose(estimate, torch.stack(xs).mean(0), rtol=0, atol=1e-5)


def test_a_rotation_helps_where_one_value_sticks_out() -> None:
    layout = layout_of((512,))
    xs = [buffer(layout, rank) for rank in range(2)]
    for x in xs:
        x[7] = 100.0
    exact = torch.stack(xs).mean(0).numpy()
    plain, turned = (
        np.linalg.norm(World(method, len(xs), layout).mean(xs) - exact)
        for method in (HomomorphicQuantizer(4), RandomHadamard(HomomorphicQuantizer(4)))
    )
    assert turned < 0.4 * plain


def test_the_requests_are_a_gather_of_ranges_and_a_sum_of_words() -> None:
    layout = layout_of((1000,))
    for method, kind in ((HomomorphicQuantizer(4), torch.bfloat16), (TernGrad(), torch.float32)):
        from distcomp.methods import StepContext

        aggregation = method.aggregate(buffer(layout, 0), {}, StepContext(0, 4, layout, 0, Key.of(0)))
        asked = next(aggregation)
        assert isinstance(asked, AllGather)
        assert asked.payload.parts[0].dtype == kind
        total = aggregation.send([asked.payload] * 4)
        assert isinstance(total, AllReduce)
        assert total.x.dtype == torch.int32


def test_what_cannot_be_is_refused_in_words() -> None:
    for make, said in (
        (lambda: shared_range(bits=1), "2 to 16 bits"),
        (lambda: shared_range(block=0), "at least one"),
        (lambda: terngrad(clip=-1), "deviations"),
        (lambda: shared_range(hadamard=True, block=100), "power of two"),
        (lambda: HomomorphicQuantizer(16).width(2**20), "fewer bits"),
    ):
        with pytest.raises(DistcompError, match=said):
            make()


def test_terngrad_sends_a_matrix_of_one_value() -> None:
    """Whose standard deviation is 0: the paper clips at 2.5 of them, where the mean is 0."""
    layout = layout_of((8, 8))
    xs = [torch.full((64,), 0.75)] * 2
    assert np.array_equal(World(TernGrad(), 2, layout).mean(xs), np.full(64, 0.75, np.float32))
