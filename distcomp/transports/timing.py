"""How long do messages take? Exchanges between all ranks of a process group, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.distributed as dist

from distcomp.network.fabric import Fabric
from distcomp.network.framing import framed_bytes
from distcomp.network.probe import LinkFit, fabric_from, link_of, racks_of

Times = list[list[float]]
"""Seconds: for each size, each repetition."""

RankPair = tuple[int, int]


@dataclass(frozen=True)
class Probed:
    """A network as it was measured: the times of every pair, the links behind them, the fabric they make."""

    sizes: list[int]
    times_s: dict[RankPair, Times]
    links: dict[RankPair, LinkFit]
    fabric: Fabric


def probed(sizes: list[int], repeats: int) -> Probed | None:
    """Join the others whom the launcher started, over Gloo; measure every pair in turn, then all ranks of a
    rack at once. What was found is told on rank 0, the others get None."""
    dist.init_process_group("gloo")
    try:
        measured = _measured(sizes, repeats)
        return measured if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def _measured(sizes: list[int], repeats: int) -> Probed:
    ranks = dist.get_world_size()
    mine = {(i, j): pair_seconds(i, j, sizes, repeats) for i, j in combinations(range(ranks), 2)}
    everyone: list[dict[RankPair, Times]] = [{} for _ in range(ranks)]
    dist.all_gather_object(everyone, mine)
    times_s = {pair: everyone[pair[0]][pair] for pair in mine}
    links = {pair: link_of(sizes, times) for pair, times in times_s.items()}
    seconds = np.zeros((ranks, ranks))
    for (i, j), link in links.items():
        seconds[i, j] = seconds[j, i] = link.curve_s[-1]
    racks = racks_of(seconds)
    uplinks_bps = []
    if len(racks) > 1:
        for rack in racks:
            taken_s = outgoing_seconds(rack, sizes[-1], repeats)
            uplinks_bps.append(8 * framed_bytes(len(rack) * sizes[-1]) / taken_s)
    return Probed(sizes, times_s, links, fabric_from(links, racks, uplinks_bps))


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


def outgoing_seconds(group: Sequence[int], nbytes: int, repeats: int) -> float:
    """Every rank of ``group`` sends so many bytes to ranks outside, all at once; the median until all have
    arrived. All ranks call it."""
    here, ranks = dist.get_rank(), dist.get_world_size()
    outside = [rank for rank in range(ranks) if rank not in group]
    pairs = [(source, outside[index % len(outside)]) for index, source in enumerate(group)]
    message = torch.zeros(nbytes, dtype=torch.uint8)

    def exchange() -> None:
        works = [dist.irecv(torch.empty_like(message), source) for source, to in pairs if to == here]
        works += [dist.isend(message, to) for source, to in pairs if source == here]
        for work in works:
            assert work is not None
            work.wait()

    return sorted(_repeated(exchange, repeats))[repeats // 2]


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
