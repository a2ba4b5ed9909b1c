"""What every trainer must show, whatever it is: the same training, fewer bytes, equal replicas, and a resume
that nobody notices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ONE_BIT = "qsgd:bits=1,block=128"  # with error feedback: there is something to remember
STEPS = 6
HALF = 3


@dataclass
class Trained:
    weights: Tensor
    sent_bytes: int


Train = Callable[[str | None, int, Path | None, Path | None], Trained]
"""(method or None for the trainer alone, steps, where to save at the end, what to resume from)."""


def flat(model: nn.Module) -> Tensor:
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().float().flatten() for p in whole])


def local(rank: int, size: int) -> None:
    """What torchrun tells a worker of its host."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def equal_everywhere(weights: Tensor) -> bool:
    everyone = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, weights)
    return all(torch.equal(one, weights) for one in everyone)


def show(train: Train, directory: Path, plain: str = "ddp") -> dict[str, object]:
    """Train in five ways; what a test asserts about them. ``plain`` carries what the trainer itself would."""
    alone = train(None, STEPS, None, None)
    carried = train(plain, STEPS, None, None)
    fewer = train(ONE_BIT, STEPS, None, None)
    train(ONE_BIT, HALF, directory, None)
    resumed = train(ONE_BIT, STEPS, None, directory)
    return {
        "same training": torch.equal(alone.weights, carried.weights),
        "times fewer bytes": carried.sent_bytes / fewer.sent_bytes,
        "compressed": not torch.equal(alone.weights, fewer.weights),
        "replicas agree": equal_everywhere(fewer.weights),
        "resume is bit-equal": torch.equal(fewer.weights, resumed.weights),
    }


def check(shown: list[dict[str, object]], least_factor: float) -> None:
    """Of every rank."""
    for one in shown:
        factor = one.pop("times fewer bytes")
        assert isinstance(factor, float)
        assert factor > least_factor
        assert one == dict.fromkeys(one, True), one
