"""Random numbers for rounding, and the straight-through rule: what every quantizer at rest shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.kernels import reference
from distcomp.randomness import Key

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as int64
MIX = (-4658895280553007687, -7723592293110705685)


class Noise(nn.Module):
    """Uniform numbers in [0, 1): a function of key, draw and element, never of the global generator.

    ``draws`` counts what was drawn and is a buffer: a model that is loaded goes on where it was saved.
    """

    draws: Tensor

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.key = key.bits - (1 << 64) if key.bits >> 63 else key.bits
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def next_key(self) -> Tensor:
        """The key of one draw (int64 of no dimensions), to be used now or in backward."""
        self.draws += 1
        return hash_bits(self.draws * GOLDEN + self.key)

    def forward(self, like: Tensor) -> Tensor:
        """One number for each element of ``like``."""
        return uniform_like(like, self.next_key())


def hash_bits(z: Tensor) -> Tensor:
    """SplitMix64's output function on int64, whose products wrap: neighbouring draws get unlike keys."""
    z = (z ^ _shifted(z, 30)) * MIX[0]
    z = (z ^ _shifted(z, 27)) * MIX[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def uniform_like(x: Tensor, key: Tensor) -> Tensor:
    """Numbers in [0, 1) of the shape of ``x``."""
    return reference.uniform(x.numel(), key, 0, x.device).view(x.shape)


class StraightThrough(torch.autograd.Function):
    """Forward: ``quantized``. Backward: the gradient passes to ``x``, where ``inside`` holds (everywhere, if
    None)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return quantized.clone() if quantized is x else quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (inside,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient if inside is None else gradient * inside, None, None


def straight_through(x: Tensor, quantized: Tensor, inside: Tensor | None = None) -> Tensor:
    """``quantized``, with the gradient of ``x`` (times ``inside``) in the place of its own."""
    passed: Tensor = StraightThrough.apply(x, quantized.detach(), inside)  # type: ignore[no-untyped-call]
    return passed


def sign(x: Tensor) -> Tensor:
    """+1 or -1; sign(0) = +1. NaN stays NaN."""
    return torch.where(x < 0, -1.0, torch.where(x >= 0, 1.0, x)).to(x.dtype)
