"""DoReFa-Net: low-bitwidth weights, activations and gradients (Zhou 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.precision.convert import BitWidths, Quantizers, convert
from distcomp.precision.noise import Noise, sign, straight_through, uniform_like
from distcomp.precision.quantizer import FULL, WeightQuantizer
from distcomp.randomness import Key

TINY = torch.finfo(torch.float32).tiny
"""In the place of a largest magnitude of 0: what it divides is 0, too."""


def dorefa(
    model: nn.Module,
    weights: int = 1,
    activations: int = 2,
    gradients: int = 6,
    *,
    stochastic: bool = True,
    skip: tuple[str, ...] = ("first", "last"),
    seed: int = 0,
    rank: int = 0,
) -> nn.Module:
    """Compute with weights, inputs and gradients of outputs of so many bits.

    ::

        quantize_k(x) = round((2^k - 1) x) / (2^k - 1)                               x in [0, 1]
        W = sign(w) E|w|   (1 bit),     2 quantize_k(tanh w / (2 max|tanh w|) + 1/2) - 1   (more)
        a = quantize_k(clip(x, 0, 1))
        d = 2 m [quantize_k(clip(dy / (2 m) + 1/2 + N, 0, 1)) - 1/2],    m = max|dy| of each sample,
                                                                        N uniform in +-1/2 / (2^k - 1)

    32 bits leave a tensor as it is. The gradients of the weights are not quantized: what is sent of them is
    the choice of the method that is attached. ``stochastic=False`` takes N = 0, a control: small gradients
    then round away. The first and the last layer stay in float32, or whichever ``skip`` names. ``rank`` makes
    the noise a rank's own.

    Source: Zhou et al., "DoReFa-Net", 2016. We differ: a sample whose gradient is all zero stays zero (the
    formula divides by it).

    Raises DistcompError for bits outside 1..32, or a model without layers to convert.
    """
    for what, bits in (("weights", weights), ("activations", activations), ("gradients", gradients)):
        if not 1 <= bits <= FULL:
            raise DistcompError(f"dorefa takes 1 to 32 bits for {what}, not {bits}")

    def plan(name: str, layer: nn.Module) -> Quantizers:
        noise = Noise(Key.of("precision", seed, name, rank)) if stochastic else None
        return Quantizers(
            BitWidths(weights, activations, gradients),
            {"weight": DorefaWeight(weights)} if weights < FULL else {},
            input_quantizer=DorefaActivation(activations) if activations < FULL else None,
            output_quantizer=DorefaGradient(gradients, noise) if gradients < FULL else None,
        )

    return convert(model, plan, skip)


def quantize_unit(x: Tensor, bits: int) -> Tensor:
    """``round((2^k - 1) x) / (2^k - 1)`` for x in [0, 1], ties to even."""
    levels = float(2**bits - 1)
    return torch.round(x * levels) / levels


class DorefaWeight(WeightQuantizer):
    """The weight that is computed with; gradients pass straight through the rounding, not through tanh."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def width(self) -> float:
        """As many as it was made with."""
        return self.bits

    def scales(self, weight: Tensor) -> int:
        """``E|w|``, for signs."""
        return int(self.bits == 1)

    def decode(self, w: Tensor) -> Tensor:
        """Equation of :func:`dorefa`."""
        if self.bits == 1:
            return straight_through(w, sign(w) * w.abs().mean())
        t = torch.tanh(w)
        unit = t / (2 * t.abs().max().clamp(min=TINY)) + 0.5
        return 2 * straight_through(unit, quantize_unit(unit, self.bits)) - 1


class DorefaActivation(nn.Module):
    """Clip to [0, 1] and quantize; the gradient passes where nothing was clipped."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Equation of :func:`dorefa`."""
        unit = x.clamp(0, 1)
        return straight_through(unit, quantize_unit(unit, self.bits))


def quantize_gradient(dy: Tensor, bits: int, u: Tensor | None) -> Tensor:
    """DoReFa's f: ``dy`` with the batch as first axis, ``u`` uniform in [0, 1) or None for no noise."""
    if dy.numel() == 0:
        return dy
    # Of each sample, as in the paper: gradients of samples that are learnt already are much smaller.
    largest = dy.abs().amax(dim=tuple(range(1, dy.dim())), keepdim=True) if dy.dim() > 1 else dy.abs()
    m = largest.clamp(min=TINY)
    unit = dy / (2 * m) + 0.5
    if u is not None:
        unit = unit + (u - 0.5) / float(2**bits - 1)
    rounded = 2 * m * (quantize_unit(unit.clamp(0, 1), bits) - 0.5)
    return torch.where(largest > 0, rounded, dy)


class QuantizedBack(torch.autograd.Function):
    """Forward: nothing. Backward: the gradient through :func:`quantize_gradient`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int, key: Tensor | None) -> Tensor:
        ctx.bits, ctx.key = bits, key
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        u = None if ctx.key is None else uniform_like(dy, ctx.key)
        return quantize_gradient(dy, ctx.bits, u), None, None


class DorefaGradient(nn.Module):
    """Quantize the gradient of a layer's output, on its way back."""

    def __init__(self, bits: int, noise: Noise | None) -> None:
        super().__init__()
        self.bits = bits
        self.noise = noise

    def forward(self, y: Tensor) -> Tensor:
        """``y`` itself."""
        # Drawn in the forward: a backward that runs twice rounds alike, and the count goes by forwards.
        key = None if self.noise is None else self.noise.next_key()
        passed: Tensor = QuantizedBack.apply(y, self.bits, key)  # type: ignore[no-untyped-call]
        return passed
