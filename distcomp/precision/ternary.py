"""Trained ternary quantization (Zhu 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.precision.convert import BitWidths, Quantizers, convert
from distcomp.precision.quantizer import WeightQuantizer

TERNARY_BITS = 2
"""Of one of three values."""


def ttq(
    model: nn.Module,
    threshold: float = 0.05,
    *,
    initial: float | None = None,
    skip: tuple[str, ...] = ("first", "last"),
) -> nn.Module:
    """Compute with weights of -W_n, 0 or +W_p: two numbers that each layer learns.

    ::

        t = threshold max|w|;    W = W_p where w > t,  -W_n where w < -t,  0 between
        dL/dW_p = sum of dL/dW where w > t;      dL/dW_n = -sum of dL/dW where w < -t
        dL/dw   = W_p dL/dW,  dL/dW (between),  W_n dL/dW

    ``initial`` is where W_p and W_n begin; None takes the mean magnitude of the weights that they stand for.
    W_p and W_n are parameters, whose gradients are sums over a whole layer: with SGD give the optimizer
    ``distcomp.precision.slow_groups(model, lr, slower=1.0)`` after the conversion, or they run off.

    Source: Zhu et al., "Trained ternary quantization", ICLR 2017. We differ: the authors' code begins at 1.0,
    which suits networks whose every layer a batch norm follows; a weight equal to the threshold is 0.

    Raises DistcompError for a threshold outside 0..1.
    """
    if not 0 <= threshold < 1:
        raise DistcompError(
            f"the threshold is a share of the largest weight, not {threshold}; the paper takes 0.05"
        )

    def plan(name: str, layer: nn.Module) -> Quantizers:
        latent: Tensor = layer.weight  # type: ignore[assignment]
        return Quantizers(BitWidths(TERNARY_BITS), {"weight": TrainedTernary(latent, threshold, initial)})

    return convert(model, plan, skip)


class Ternarize(torch.autograd.Function):
    """``W_p [w > t] - W_n [w < -t]`` with the paper's gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, positive: Tensor, negative: Tensor, t: Tensor) -> Tensor:
        above, below = (w > t).to(w.dtype), (w < -t).to(w.dtype)
        ctx.save_for_backward(above, below, positive, negative)
        return positive * above - negative * below

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        above, below, positive, negative = ctx.saved_tensors
        (g,) = gradients
        latent = g * (positive * above + negative * below + (1 - above - below))
        return latent, (g * above).sum().view_as(positive), -(g * below).sum().view_as(negative), None


class TrainedTernary(WeightQuantizer):
    """The ternary weight and its two magnitudes."""

    def __init__(self, latent: Tensor, threshold: float, initial: float | None) -> None:
        super().__init__()
        self.threshold = threshold
        w = latent.detach()
        t = threshold * w.abs().max()
        self.positive = nn.Parameter(_start(w[w > t], initial, w))
        self.negative = nn.Parameter(_start(-w[w < -t], initial, w))

    @property
    def width(self) -> float:
        """Of -W_n, 0 and W_p."""
        return TERNARY_BITS

    def scales(self, weight: Tensor) -> int:
        """W_n and W_p."""
        return 2

    def decode(self, w: Tensor) -> Tensor:
        """The weight that is computed with."""
        # A constant to the gradient: the paper moves no weight to move the threshold.
        t = self.threshold * w.detach().abs().max()
        weight: Tensor = Ternarize.apply(w, self.positive, self.negative, t)  # type: ignore[no-untyped-call]
        return weight


def _start(magnitudes: Tensor, initial: float | None, like: Tensor) -> Tensor:
    """One element, not a scalar: FSDP2 shards no scalars."""
    if initial is None:
        initial = float(magnitudes.mean()) if magnitudes.numel() else 1.0
    return like.new_full((1,), initial)
