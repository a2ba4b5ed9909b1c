"""How long do messages take? Exchanges between all ranks of a process group, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Times = list[list[float]]
"""Seconds: for each size, each repetition."""


def direct_seconds(sizes: Sequence[int], repeats: int) -> Times:
    """Every rank sends so many bytes in equal parts to all others; until the last rank is done."""
    here, ranks = dist.get_rank(), dist.get_world_size()
    others = [(here + shift) % ranks for shift in range(1, ranks)]

    def exchange(nbytes: int) -> None:
        part = torch.zeros(max(1, nbytes // (ranks - 1)), dtype=torch.uint8)
        received = [torch.empty_like(part) for _ in others]
        works = [dist.irecv(one, other) for one, other in zip(received, others[::-1], strict=True)]
        works += [dist.isend(part, other) for other in others]
        for work in works:
            assert work is not None
            work.wait()

    return [_repeated(lambda nbytes=nbytes: exchange(nbytes), repeats) for nbytes in sizes]  # type: ignore[misc]


def ring_seconds(sizes: Sequence[int], repeats: int) -> Times:
    """An all-reduce in which every rank sends so many bytes; until the last rank is done."""
    ranks = dist.get_world_size()
    tensors = [torch.zeros(max(ranks, round(nbytes * ranks / (2 * (ranks - 1)) / 4))) for nbytes in sizes]
    return [_repeated(lambda x=x: dist.all_reduce(x), repeats) for x in tensors]  # type: ignore[misc]


def pair_seconds(source: int, target: int, sizes: Sequence[int], repeats: int) -> Times:
    """One way from ``source`` to ``target``: a message's way there and a byte's way back, less the latter.

    All ranks call it; those who are not the two wait.
    """
    here = dist.get_rank()
    dist.barrier()
    if here not in (source, target):
        return []
    other = source + target - here
    byte = torch.zeros(1, dtype=torch.uint8)

    def round_trip(nbytes: int) -> float:
        message = torch.zeros(nbytes, dtype=torch.uint8)
        begin_s = time.perf_counter()
        if here == source:
            dist.send(message, other)
            dist.recv(byte, other)
        else:
            dist.recv(message, other)
            dist.send(byte, other)
        return time.perf_counter() - begin_s

    round_trip(1)
    back_s = sorted(round_trip(1) for _ in range(repeats))[repeats // 2] / 2
    return [[max(0.0, round_trip(nbytes) - back_s) for _ in range(repeats)] for nbytes in sizes]


def _repeated(exchange: Callable[[], object], repeats: int) -> list[float]:
    """Of each repetition the slowest rank's time; the first, which opens connections, is left out."""
    mine = []
    for _ in range(repeats + 1):
        dist.barrier()
        begin_s = time.perf_counter()
        exchange()
        mine.append(time.perf_counter() - begin_s)
    slowest = torch.tensor(mine[1:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return list(map(float, slowest))
