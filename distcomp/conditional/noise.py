"""Random numbers of a layer, drawn from what goes into it and its weights: no counter to save, none to keep
alike."""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.randomness import Key


def generator_of(use: str, x: Tensor, *weights: Tensor) -> torch.Generator:
    """A CPU generator seeded by the bits of ``x`` and of ``weights``: recomputed activations and resumed runs
    draw the same numbers, ranks with other examples draw others. With the weights that a layer trains, an
    input that comes again in a later step meets other coins."""
    return Key.of(use, *(_bits(tensor) for tensor in (x, *weights))).generator()


def _bits(tensor: Tensor) -> int:
    local = getattr(tensor, "to_local", None)  # between forwards FSDP2 holds a rank's part
    plain: Tensor = tensor if local is None else local()
    return int(plain.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64))
