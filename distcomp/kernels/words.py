"""Words of a model, whatever they mean: which have changed, and a fingerprint of all.

A word is what one number is stored as, viewed as an integer of its size: uint8, int16, int32 or int64. The
plain-torch functions are the specification; C equals them bit for bit, and serves tensors on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import served_by_c

WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a word: what it is viewed as."""
GAMMA = 0x9E3779B97F4A7C15
M64 = (1 << 64) - 1


def changed_words(before: Tensor, after: Tensor) -> Tensor:
    """The indices at which two flat tensors of words differ, rising (int64, on the CPU).

    Raises DistcompError for tensors that are not two such ones of one size.
    """
    _check_words(before)
    _check_words(after)
    if before.dtype != after.dtype or before.numel() != after.numel():
        raise DistcompError(
            f"{before.numel()} words of {before.dtype} cannot be compared with {after.numel()} of "
            f"{after.dtype}; pass two of a size"
        )
    if not (served_by_c(before) and served_by_c(after)):
        return (before != after.to(before.device)).nonzero().view(-1).cpu()
    from distcomp.kernels import _cpu, cpu

    at, itemsize = (before.data_ptr(), after.data_ptr()), before.element_size()

    def run(start: int, count: int) -> Tensor:
        there = (at[0] + start * itemsize, at[1] + start * itemsize)
        places = torch.empty(count // 16, dtype=torch.int64)  # rarely are more changed than that
        found = _cpu.changed_words(*there, places.data_ptr(), count, itemsize, places.numel())
        if found > places.numel():
            places = torch.empty(found, dtype=torch.int64)
            _cpu.changed_words(*there, places.data_ptr(), count, itemsize, found)
        return places[:found].add_(start)

    return torch.cat(cpu.shared(run, before.numel(), 1, itemsize))


def fingerprint(words: Tensor, *, seed: int, first: int = 0) -> int:
    """``sum_i mix(seed + word_i + (first + i + 1) gamma) mod 2^64``, where ``mix`` is SplitMix64's output
    function and a word counts as unsigned.

    A sum: fingerprints of pieces add up to that of the whole, and a changed word changes it by two terms.
    Meant for accidents, not for an adversary.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    _check_words(words)
    if not served_by_c(words):
        places = torch.arange(words.numel(), dtype=torch.int64, device=words.device) + first
        return fingerprint_at(words, places, seed=seed)
    from distcomp.kernels import _cpu, cpu

    at, itemsize = words.data_ptr(), words.element_size()

    def run(start: int, count: int) -> int:
        return _cpu.fingerprint(at + start * itemsize, count, itemsize, first + start, seed & M64)

    return sum(cpu.shared(run, words.numel(), 1, itemsize)) & M64


def fingerprint_at(words: Tensor, places: Tensor, *, seed: int) -> int:
    """The terms of :func:`fingerprint` of words at these places (int64): the specification."""
    # Arithmetic of int64 is that of uint64, but for the shifts: the bits that come in on the left are masked.
    mask = (1 << 8 * words.element_size()) - 1 if words.element_size() < 8 else -1
    z = (words.to(torch.int64) & mask) + places * signed64(GAMMA) + signed64(GAMMA + seed)
    z = (z ^ _shifted(z, 30)) * signed64(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * signed64(0x94D049BB133111EB)
    return int((z ^ _shifted(z, 31)).sum()) & M64


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << 64 - by) - 1)


def signed64(number: int) -> int:
    """The int64 that has the bits of ``number mod 2^64``."""
    return ((number + (1 << 63)) & M64) - (1 << 63)


def _check_words(words: Tensor) -> None:
    if words.dtype not in WORD_DTYPES.values() or words.dim() != 1 or not words.is_contiguous():
        raise DistcompError(
            f"words are flat, contiguous uint8, int16, int32 or int64, not {words.dim()}-D {words.dtype}; "
            "view the tensor as such"
        )
