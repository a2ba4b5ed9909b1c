"""Random numbers of a layer, drawn from what goes into it: no counter to save, none to keep alike."""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.randomness import Key


def generator_of(use: str, x: Tensor) -> torch.Generator:
    """A CPU generator seeded by the bits of ``x``: recomputed activations and resumed runs draw the same
    numbers, ranks with other examples draw others."""
    bits = x.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64)
    return Key.of(use, int(bits)).generator()
