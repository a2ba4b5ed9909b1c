"""Large buckets are exchanged piece by piece, and nobody can tell by the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
import distcomp.attaching.bucket as buckets
from distcomp.layout import Layout

SPECS = [
    "identity",
    "qsgd:bits=4,block=16",
    "powersgd:rank=1",
    "topk:ratio=0.2",
    "ef21",
    "random_k:ratio=0.3",
]
LAYOUT = Layout.of([("a", (3, 4)), ("b", (5,)), ("c", (2, 2)), ("d", (7,))])


@pytest.mark.parametrize(
    ("least", "names"),
    [
        (1, [("a",), ("b",), ("c",), ("d",)]),
        (6, [("a",), ("b", "c"), ("d",)]),
        (12, [("a",), ("b", "c", "d")]),  # 16 follow the first
        (17, [("a", "b", "c", "d")]),  # what is left, 11, is less than asked
        (1000, [("a", "b", "c", "d")]),
    ],
)
def test_runs_are_of_whole_slices_and_lie_end_to_end(least: int, names: list[tuple[str, ...]]) -> None:
    runs = LAYOUT.runs(least)
    assert [run.names for run in runs] == names
    assert tuple(param for run in runs for param in run.slices) == LAYOUT.slices


def test_a_layout_of_nothing_is_one_run() -> None:
    assert Layout(()).runs(5) == (Layout(()),)


def steps(rank: int, size: int, spec: str, piece: int, poison: bool) -> list[torch.Tensor]:
    """Gradients of some steps; in the second one a gradient is infinite, if ``poison``."""
    kept, buckets.PIECE = buckets.PIECE, piece
    try:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16), nn.Linear(16, 8)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        draw = torch.Generator().manual_seed(rank)
        seen = []
        with distcomp.attach(model, optimizer, spec):
            for step in range(4):
                optimizer.zero_grad()
                times = float("inf") if poison and step == 1 and rank == 1 else 1.0
                (model(torch.randn(4, 32, generator=draw)).square().mean() * times).backward()
                seen.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
                if seen[-1].isfinite().all():
                    optimizer.step()
        return seen
    finally:
        buckets.PIECE = kept


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize(
    "spec",
    ["identity", "qsgd:bits=4,block=16", "powersgd:rank=1", "topk:ratio=0.2", "ef21", "random_k"],
)
def test_pieces_give_the_gradients_of_whole_buckets(cluster, spec: str, poison: bool) -> None:
    whole = cluster(2).run(steps, spec, 1 << 20, poison)
    for piece in (1, 600):
        cut = cluster(2).run(steps, spec, piece, poison)
        for mine, others in zip(whole, cut, strict=True):
            for one, other in zip(mine, others, strict=True):
                assert torch.equal(one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0))
