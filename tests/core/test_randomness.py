"""Keys: a known function of what is folded in, and of nothing else."""

from __future__ import annotations

from hashlib import blake2b

import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.randomness import Key

parts = st.one_of(st.integers(-(2**70), 2**70), st.text(st.characters(min_codepoint=32), max_size=8))


def test_a_key_is_blake2b_of_what_is_folded_in() -> None:
    """The definition, written out: runs of different versions of distcomp must draw the same numbers."""
    first = blake2b(b"int:7\x1fint:3", digest_size=8, key=bytes(8)).digest()
    second = blake2b(b"str:scatter", digest_size=8, key=first).digest()
    assert Key.of(7, 3).fold("scatter").bits == int.from_bytes(second, "little")
    assert Key.of(7, 3).bits == 6957383173944063652


@given(st.lists(parts, max_size=3), st.lists(parts, max_size=3))
def test_different_parts_make_different_keys(one: list[int | str], other: list[int | str]) -> None:
    assert (Key.of(*one) == Key.of(*other)) == ([(type(p), p) for p in one] == [(type(p), p) for p in other])


def test_neither_order_nor_grouping_is_forgotten() -> None:
    keys = [Key.of(1, 2), Key.of(2, 1), Key.of(1).fold(2), Key.of("1", 2), Key.of(12), Key.of("1", "2")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key.bits < 2**64 for key in keys)


def test_a_generator_repeats_itself_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (torch.randn(5, generator=Key.of(i).generator()) for i in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
