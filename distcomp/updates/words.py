"""A tensor as words, and the distance between two words in units of the last place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.words import WORD_DTYPES


@dataclass(frozen=True)
class WordType:
    """How many bytes a word has, and whether its first bit is the sign of a floating-point number."""

    itemsize: int
    floating: bool

    @property
    def dtype(self) -> torch.dtype:
        """What words of this size are viewed as."""
        return WORD_DTYPES[self.itemsize]


def word_type(dtype: torch.dtype) -> WordType:
    """Of any dtype: one word an element, two for a complex one. Raises DistcompError for quantized dtypes."""
    halves = 2 if dtype.is_complex else 1
    itemsize = dtype.itemsize // halves
    if itemsize not in WORD_DTYPES or str(dtype).startswith("torch.q"):
        raise DistcompError(f"updates have no words for {dtype}; convert the tensor, or leave it out")
    return WordType(itemsize, dtype.is_floating_point or dtype.is_complex)


def words_of(tensor: Tensor) -> Tensor:
    """The flat words of a contiguous tensor: a view of its memory."""
    flat = tensor.detach().reshape(-1)
    if not tensor.numel():
        return torch.empty(0, dtype=word_type(tensor.dtype).dtype, device=tensor.device)
    return flat.view(word_type(tensor.dtype).dtype)


def ordinals(words: Tensor, kind: WordType) -> Tensor:
    """int64 -> int64: floating-point words in the order of the numbers that they are; neighbours differ by 1.

    ``w`` where the sign bit is 0, ``-1 - magnitude`` where it is 1 (so that -0 lies below 0). Its own
    inverse. Whole numbers are in order as they are.
    """
    if not kind.floating:
        return words
    magnitude_mask = (1 << 8 * kind.itemsize - 1) - 1
    return words ^ ((words >> 63) & magnitude_mask)


def widened(words: Tensor, kind: WordType) -> Tensor:
    """Words as int64, the sign bit spread: also those of one byte, which torch views as unsigned."""
    return wrapped(words.to(torch.int64), kind)


def wrapped(numbers: Tensor, kind: WordType) -> Tensor:
    """int64, modulo ``2^bits`` of a word, in ``[-2^(bits-1), 2^(bits-1))``."""
    shift = 64 - 8 * kind.itemsize
    return (numbers << shift) >> shift


def distances(before: Tensor, after: Tensor, kind: WordType) -> Tensor:
    """From word to word, in units of the last place, modulo ``2^bits`` (int64)."""
    return wrapped(ordinals(widened(after, kind), kind) - ordinals(widened(before, kind), kind), kind)


def moved(before: Tensor, distance: Tensor, kind: WordType) -> Tensor:
    """The words that lie ``distance`` after those before: the inverse of :func:`distances`."""
    after = ordinals(wrapped(ordinals(widened(before, kind), kind) + distance, kind), kind)
    return after.to(kind.dtype)
