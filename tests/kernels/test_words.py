"""Words of 1, 2, 4 and 8 bytes: C against the plain-torch specification, bit for bit, and that against the
paper's function in Python's integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.words import GAMMA, M64, WORD_DTYPES, changed_words, fingerprint, fingerprint_at
from tests.updates import oracle

SIZES = sorted(WORD_DTYPES)
LENGTHS = [0, 1, 7, 8, 15, 16, 31, 33, 63, 64, 65, 127, 129, 1023, 4097]
OFFSETS = [0, 1, 3, 13]
SHARED = (1 << 20) + 3
"""Words enough for threads to share, and not a whole number of stretches."""


def drawn(numel: int, itemsize: int, offset: int, seed: int = 0) -> Tensor:
    """Words of any bits, which begin ``offset`` words into their memory."""
    generator = torch.Generator().manual_seed(seed * 1009 + numel)
    raw = torch.randint(0, 256, ((numel + offset) * itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(WORD_DTYPES[itemsize])[offset:]


def altered(words: Tensor, share: float) -> Tensor:
    """A copy at another alignment, of which a share of the words differ in one bit, of any place."""
    generator = torch.Generator().manual_seed(words.numel())
    copy = torch.cat([words[:1], words])[1 if words.numel() else 0 :]
    places = (torch.rand(words.numel(), generator=generator) < share).nonzero().view(-1)
    bits = torch.randint(0, 8 * words.element_size(), places.shape, generator=generator)
    copy[places] ^= (torch.ones_like(bits) << bits).to(words.dtype)
    return copy


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_changed_words_are_those_that_torch_finds(itemsize, offset):
    for numel in LENGTHS:
        before = drawn(numel, itemsize, offset)
        for share in (0.0, 0.02, 0.5, 1.0):
            after = altered(before, share)
            found = changed_words(before, after)
            assert found.dtype == torch.int64
            assert found.equal((before != after).nonzero().view(-1)), (numel, share)
        for place in {0, numel // 2, numel - 1} if numel else set():
            after = before.clone()
            after[place] ^= 1
            assert changed_words(before, after).tolist() == [place]


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_fingerprint_is_that_of_torch(itemsize, offset):
    for numel in LENGTHS:
        words = drawn(numel, itemsize, offset)
        for seed, first in ((0, 0), (M64, 5), (GAMMA, (1 << 40) + 1)):
            places = torch.arange(numel) + first
            assert fingerprint(words, seed=seed, first=first) == fingerprint_at(words, places, seed=seed), (
                numel
            )


@pytest.mark.parametrize("itemsize", SIZES)
def test_the_specification_is_the_paper_s(itemsize):
    words = drawn(65, itemsize, 1)
    unsigned = [int(word) & (1 << 8 * itemsize) - 1 for word in words]
    for seed, first in ((0, 0), (M64 - 2, 77)):
        due = oracle.fingerprint(unsigned, seed, first)
        assert fingerprint_at(words, torch.arange(65) + first, seed=seed) == due
        assert fingerprint(words, seed=seed, first=first) == due


@pytest.mark.parametrize("itemsize", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_words_without_a_difference(itemsize, threads):
    before = drawn(SHARED, itemsize, 1)
    after = altered(before, 0.001)
    had = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, said = changed_words(before, after), fingerprint(after, seed=9, first=2)
    finally:
        torch.set_num_threads(had)
    assert found.equal((before != after).nonzero().view(-1))
    assert said == fingerprint_at(after, torch.arange(SHARED) + 2, seed=9)


def test_what_are_no_words_of_one_size_is_refused():
    words = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(DistcompError, match=r"8 words of torch\.int32 cannot be compared with 7"):
        changed_words(words, words[:7])
    with pytest.raises(DistcompError, match="words are flat, contiguous"):
        fingerprint(words[::2], seed=0)
    with pytest.raises(DistcompError, match="words are flat, contiguous"):
        changed_words(words.float(), words.float())
