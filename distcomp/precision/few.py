"""Neural networks with few multiplications: ternary connect, and shifts in backward (Lin 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.utils.parametrize import type_before_parametrizations

from distcomp.errors import DistcompError
from distcomp.kernels.reference import round_at_random
from distcomp.precision.binary import BinaryWeight, Clip, glorot_scale
from distcomp.precision.convert import BitWidths, Quantizers, convert
from distcomp.precision.noise import Noise, sign, straight_through, uniform_like
from distcomp.precision.quantizer import WeightQuantizer
from distcomp.randomness import Key


def few_multiplications(
    model: nn.Module,
    *,
    weights: str = "ternary",
    shift_bits: int | None = 4,
    skip: tuple[str, ...] = (),
    seed: int = 0,
    rank: int = 0,
) -> nn.Module:
    """Replace multiplications: forward by weights of -H, 0, +H, and those of dL/dW by binary shifts.

    ::

        W = H sign(w) b,  P(b = 1) = min(|w|/H, 1)            E[W] = w;     H = sqrt(6/(fan_in + fan_out)) / 2
        dL/dW = dy^T p(x),  p(x) = sign(x) 2^k or sign(x) 2^(k+1),  k = floor(log2 |x|),  E[p(x)] = x

    ``weights="binary"`` takes :func:`distcomp.precision.binary_connect`'s stochastic ones. ``shift_bits``
    limits k to the ``2^shift_bits`` exponents up to the largest of the tensor; what lies below the least of
    them becomes 0 or it, with the right mean; None does not limit it. ``shift_bits=0`` leaves x as it is.
    Latent weights stay within +-H, and are computed with in ``eval()``.

    Source: Lin et al., "Neural networks with few multiplications", ICLR 2016. We differ: the gradient of
    what batch norms do is not quantized, as in the authors' code.

    Raises DistcompError for unknown weights, or shift bits outside 0..8.
    """
    if weights not in ("ternary", "binary"):
        raise DistcompError(f"few_multiplications knows ternary and binary weights, not {weights!r}")
    if shift_bits is not None and not 0 <= shift_bits <= 8:
        raise DistcompError(f"a shift takes 0 to 8 bits, or None for any, not {shift_bits}")
    shift = None if shift_bits is None else 2**shift_bits

    def plan(name: str, layer: nn.Module) -> Quantizers:
        h, key = glorot_scale(layer), Key.of("precision", seed, name, rank)
        kind = TernaryWeight if weights == "ternary" else BinaryWeight
        width = 2 if weights == "ternary" else 1
        quantizers = Quantizers(BitWidths(width), {"weight": kind(h, Noise(key))}, weight_projection=Clip(h))
        if shift_bits != 0:
            quantizers.kind = shifted_kind(layer)
            quantizers.attributes = {"shift": Noise(key.fold("shift")), "exponents": shift}
        return quantizers

    return convert(model, plan, skip)


class TernaryWeight(WeightQuantizer):
    """``h sign(w) b`` with ``P(b = 1) = |w| / h``; the gradient passes straight through."""

    def __init__(self, h: float, noise: Noise) -> None:
        super().__init__()
        self.h = h
        self.noise = noise

    def decode(self, w: Tensor) -> Tensor:
        """The weight that is computed with."""
        if not self.training:
            return w  # the mean of what training computes with
        chance = (w.abs() / self.h).clamp(max=1)
        return straight_through(w, self.h * sign(w) * round_at_random(chance, self.noise(w)))


def power_of_two(x: Tensor, u: Tensor, exponents: int | None) -> Tensor:
    """One of the powers of two around ``|x|``, with its sign and the right mean; 0 stays 0.

    Of all exponents, or of the ``exponents`` largest that the tensor needs.
    """
    magnitude = x.abs()
    # frexp has |x| = m 2^e with m in [1/2, 1): e - 1 is floor(log2 |x|), where a logarithm would round.
    power = torch.ldexp(torch.ones_like(x), torch.frexp(magnitude).exponent - 1)
    below = torch.where(x == 0, 0.0, power)
    least = (
        below.new_zeros(()) if exponents is None or not x.numel() else below.amax() * 2.0 ** (2 - exponents)
    )
    small = magnitude < least
    base, gap = torch.where(small, 0.0, below), torch.where(small, least, below)
    share = (magnitude - base) / torch.where(gap == 0, 1.0, gap)
    return torch.copysign(base + gap * round_at_random(share, u), x)


class ShiftedLinear(torch.autograd.Function):
    """``x W^T``, whose dL/dW is made of powers of two in the place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, key: Tensor, exponents: int | None) -> Tensor:
        ctx.save_for_backward(x, w, key)
        ctx.exponents = exponents
        return nn.functional.linear(x, w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, w, key = ctx.saved_tensors
        (dy,) = gradients
        p = power_of_two(x, uniform_like(x, key), ctx.exponents)
        return dy @ w, dy.flatten(0, -2).T @ p.flatten(0, -2), None, None


class ShiftedConv2d(torch.autograd.Function):
    """``x * W``, whose dL/dW is made of powers of two in the place of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, key: Tensor, exponents: int | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, w, key)
        ctx.exponents, ctx.how = exponents, how
        return nn.functional.conv2d(x, w, None, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, w, key = ctx.saved_tensors
        (dy,) = gradients
        p = power_of_two(x, uniform_like(x, key), ctx.exponents)
        dx = conv2d_input(x.shape, w, dy, *ctx.how)  # type: ignore[no-untyped-call]
        dw = conv2d_weight(p, w.shape, dy, *ctx.how)  # type: ignore[no-untyped-call]
        return dx, dw, None, None, None


class FewLinear(nn.Linear):
    """A linear layer whose weight gradient is a sum of shifted errors."""

    shift: Noise
    exponents: int | None

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``."""
        y: Tensor = ShiftedLinear.apply(x, self.weight, self.shift.next_key(), self.exponents)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class FewConv2d(nn.Conv2d):
    """A convolution whose weight gradient is a sum of shifted errors."""

    shift: Noise
    exponents: int | None

    def forward(self, x: Tensor) -> Tensor:
        """``x * W + b``."""
        how = (self.stride, self.padding, self.dilation, self.groups)
        key = self.shift.next_key()
        y: Tensor = ShiftedConv2d.apply(x, self.weight, key, self.exponents, how)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


SWAPPED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FewLinear, nn.Conv2d: FewConv2d}


def shifted_kind(layer: nn.Module) -> type[nn.Module]:
    """The class whose weight gradient is computed by shifts."""
    kind = SWAPPED.get(type_before_parametrizations(layer))
    if kind is None or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise DistcompError(
            f"few_multiplications knows Linear and Conv2d with zero padding, not {layer}; name it in skip, "
            "or use shift_bits=0"
        )
    return kind
