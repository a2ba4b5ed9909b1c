"""The C extension ``_cpu``, and how a large tensor is shared between threads.

Blocks do not depend on one another, so a tensor above :data:`ALONE_BYTES` is cut on block boundaries into one
run of blocks per thread (``torch.get_num_threads()`` of them); C works with the interpreter lock released.
However many threads there are, the bytes are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from distcomp.kernels import _cpu
from distcomp.kernels.packing import NORMS, Coding, block_bytes

ALONE_BYTES = 1 << 20  # up to here one thread is done before another has woken
MASK = 0xFFFFFFFF
EXPONENTS = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}

T = TypeVar("T")


def quantize(
    x: Tensor, codes: Tensor, scales: Tensor, *,
    block: int, bits: int, key: int, first: int, coding: Coding,
) -> None:  # fmt: skip
    """See :func:`distcomp.kernels.quantize`."""
    coded = _coded(x, codes, scales, block, bits)
    stochastic, norm, powers = coding
    how = stochastic, NORMS.index(norm), powers

    def run(start: int, count: int) -> None:
        _cpu.quantize(*coded(start), count, block, bits, key, first + start & MASK, *how)

    shared(run, x.numel(), block, 4)


def dequantize(
    codes: Tensor, scales: Tensor, out: Tensor, *,
    block: int, bits: int, powers: bool, sign: int, times: float,
) -> None:  # fmt: skip
    """See :func:`distcomp.kernels.dequantize`."""
    coded = _coded(out, codes, scales, block, bits)

    def run(start: int, count: int) -> None:
        _cpu.dequantize(*coded(start), count, block, bits, powers, sign, times)

    shared(run, out.numel(), block, 4)


def _coded(
    values: Tensor, codes: Tensor, scales: Tensor, block: int, bits: int
) -> Callable[[int], tuple[int, int, int, tuple[int, int, int]]]:
    """Where values from one on, their codes and their scales lie, and how many there are from there on."""
    values_at, codes_at, scales_at = values.data_ptr(), codes.data_ptr(), scales.data_ptr()
    sizes, step = (values.numel(), codes.numel(), scales.numel()), block_bytes(block, bits)

    def from_(start: int) -> tuple[int, int, int, tuple[int, int, int]]:
        row = start // block
        left = (sizes[0] - start, sizes[1] - step * row, sizes[2] - row)
        return values_at + 4 * start, codes_at + step * row, scales_at + 4 * row, left

    return from_


def all_finite(x: Tensor) -> bool:
    """See :func:`distcomp.kernels.all_finite`."""
    at, size, exponent = x.data_ptr(), x.element_size(), EXPONENTS[x.dtype]

    def run(start: int, count: int) -> bool:
        return _cpu.all_finite(at + size * start, count, exponent)

    return all(shared(run, x.numel(), 1, size))


def checksum(data: Tensor) -> int:
    """See :func:`distcomp.kernels.checksum`; a run from word k on adds k sums to the weighted one."""
    at, nbytes = data.data_ptr(), data.numel()
    if alone(nbytes):
        total, weighted = _cpu.checksum(at, nbytes)
        return weighted << 32 | total

    def run(start: int, count: int) -> tuple[int, int]:
        total, weighted = _cpu.checksum(at + start, count)
        return total, weighted + start // 4 * total

    sums = shared(run, nbytes, 4, 1)
    return (sum(w for _, w in sums) & MASK) << 32 | sum(s for s, _ in sums) & MASK


def permuted(count: int, numel: int, keys: tuple[int, ...]) -> Tensor:
    """See :func:`distcomp.kernels.permuted`."""
    places = torch.empty(count, dtype=torch.int64)
    first, second, third, fourth, fifth, sixth = keys
    six = (first, second, third, fourth, fifth, sixth)
    _cpu.permuted(places.data_ptr(), count, numel, (numel - 1).bit_length(), six)
    return places


def exponents(x: Tensor, codes: Tensor, *, key: int, first: int) -> None:
    """See :func:`distcomp.kernels.exponents`."""
    x_at, codes_at, size = x.data_ptr(), codes.data_ptr(), codes.numel()

    def run(start: int, count: int) -> None:
        sizes = count, size - start
        _cpu.exponents(x_at + 4 * start, codes_at + start, sizes, key, first + start & MASK)

    shared(run, x.numel(), 1, 4)


def scale_by_exponents(codes: Tensor, out: Tensor) -> None:
    """See :func:`distcomp.kernels.scale_by_exponents`."""
    codes_at, out_at, size = codes.data_ptr(), out.data_ptr(), codes.numel()

    def run(start: int, count: int) -> None:
        _cpu.scale_by_exponents(codes_at + start, out_at + 4 * start, (size - start, count))

    shared(run, out.numel(), 1, 4)


def shared(run: Callable[[int, int], T], numel: int, block: int, element_bytes: int) -> list[T]:
    """run(start, count) for consecutive runs of whole blocks, a thread each; the results in order."""
    threads = _threads_for(numel * element_bytes)
    if threads == 1:
        return [run(0, numel)]
    pieces = list(_runs(numel, block, threads))
    others = [_pool(threads).submit(run, *piece) for piece in pieces[1:]]
    return [run(*pieces[0]), *(other.result() for other in others)]


def alone(nbytes: int) -> bool:
    """Whether one thread does all."""
    return _threads_for(nbytes) == 1


def _threads_for(nbytes: int) -> int:
    return torch.get_num_threads() if nbytes > ALONE_BYTES else 1


def _runs(numel: int, block: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, count) of at most ``count`` runs that cover 0 .. numel; all but the last are whole blocks."""
    blocks = -(-numel // block)
    edges = sorted({blocks * i // count for i in range(count)} | {0}) + [blocks]
    for begin, end in pairwise(edges):
        yield begin * block, min(end * block, numel) - begin * block


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="distcomp-kernels")


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
