"""What every rank remembers, brought to one: for savers that write on rank 0 alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_first(state: Mapping[str, Any], group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Every rank's ``state`` in rank order, on rank 0 of ``group``; an empty list elsewhere.

    ``state`` holds what ``torch.save`` writes and ``weights_only`` reads; nothing is unpickled.
    """
    mine = _as_bytes(state).to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    size, first = dist.get_world_size(group), dist.get_rank(group) == 0
    lengths = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(size)]
    dist.all_gather(lengths, torch.full_like(lengths[0], mine.numel()), group=group)
    padded = mine.new_zeros(int(max(lengths)))
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in range(size)] if first else None
    dist.gather(padded, parts, dst=dist.get_global_rank(group, 0), group=group)
    return [_from_bytes(part[: int(length)]) for part, length in zip(parts or (), lengths, strict=False)]


def _as_bytes(state: Mapping[str, Any]) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _from_bytes(part: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        io.BytesIO(part.cpu().numpy().tobytes()), map_location="cpu", weights_only=True
    )
    return state
