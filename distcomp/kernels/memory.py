"""Fresh memory of a bucket's size. An allocator hands it back to the system when it is freed, so that each
step's first write to it stops at every page: of 22 MB that takes several times what the write takes. Larger
pages are fewer stops."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from distcomp.kernels.dispatch import backend

LARGE_BYTES = 4 << 20
"""From here on large pages are asked for: two of Linux's usual ones."""


def empty(numel: int, device: torch.device) -> Tensor:
    """A flat float32 tensor whose values are not set, in large pages where the system has them."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    if out.nbytes >= LARGE_BYTES and device.type == "cpu" and backend(device) == "cpu":
        import_module("distcomp.kernels.cpu")._cpu.large_pages(out.data_ptr(), out.nbytes)
    return out
