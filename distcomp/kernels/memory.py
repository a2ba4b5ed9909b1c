"""Memory that is used again: what an exchange makes anew in each step lies where the last step's lay.

The C library gives freed memory of a model's size back to the system, or does not, as its heap happens to
lie; where it does, each page of the next tensor costs a fault when it is first written, and an exchange may
take more than twice as much of a core. Here such memory is kept: a tensor gets that of an earlier one of
about its size that nobody holds any more. So a process keeps between exchanges what it holds within one, also
where sizes change from step to step, as they do where some parameters are inactive: there are eight sizes of
memory between a power of two and the next.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from distcomp.private_torch import storage_is_shared

SMALLEST_BYTES = 1 << 20
"""Below, the C library keeps what is freed."""
MOST = 8
"""Pieces of one size at most: more at once are of somebody who keeps them."""

_storages: dict[int, list[torch.UntypedStorage]] = {}
_lock = threading.Lock()


def empty(numel: int, device: torch.device | None = None) -> Tensor:
    """A float32 tensor ``[numel]`` with anything in it, as ``torch.empty`` makes."""
    on_cpu = device is None or device.type == "cpu"
    if not on_cpu or 4 * numel < SMALLEST_BYTES:
        return torch.empty(numel, dtype=torch.float32, device=device)
    size = _rounded(numel)
    with _lock:
        kept = _storages.setdefault(size, [])
        free = next((one for one in kept if not storage_is_shared(one)), None)
        if free is not None:
            return torch.empty(0, dtype=torch.float32).set_(free, 0, (numel,), (1,))
        new = torch.empty(size, dtype=torch.float32)
        if len(kept) < MOST:
            kept.append(new.untyped_storage())
        return new[:numel] if numel < size else new


def _rounded(numel: int) -> int:
    """Up to a multiple of an eighth of the power of two below it."""
    step = 1 << max(0, numel.bit_length() - 4)
    return -(-numel // step) * step


def give_back() -> None:
    """Keep nothing any more: what no tensor lies in goes back to the system."""
    with _lock:
        _storages.clear()
