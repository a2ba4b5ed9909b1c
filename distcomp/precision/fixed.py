"""Fixed-point numbers with stochastic rounding, everywhere (Gupta 2015)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.compressors import FixedPoint
from distcomp.errors import DistcompError
from distcomp.precision.convert import BitWidths, Quantizers, convert
from distcomp.precision.noise import Noise, straight_through, uniform_like
from distcomp.precision.quantizer import WeightQuantizer
from distcomp.randomness import Key

ROUNDINGS = ("stochastic", "nearest")


def fixed_point(
    model: nn.Module,
    format: str | FixedPoint = "Q4.12",
    *,
    rounding: str = "stochastic",
    activations: str | FixedPoint | None = None,
    gradients: str | FixedPoint | None = None,
    exact: bool = True,
    skip: tuple[str, ...] = (),
    seed: int = 0,
    rank: int = 0,
) -> nn.Module:
    """Train with fixed-point weights, biases, activations, errors and gradients: no float copy is kept.

    ::

        w <- round(w - update)    on the grid of ``format``, after each optimizer step
        y  = round(x W + b)       on the grid of ``activations``; errors and gradients of W and b likewise on
                                  the grid of ``gradients``

    where ``round`` is :class:`distcomp.compressors.FixedPoint`'s: at random with the right mean, or to the
    nearest (then an update below half the spacing vanishes, and training stalls). Products are accumulated
    in float64, where 16-bit numbers add exactly, and are rounded once; ``exact=False`` accumulates in
    float32, which is faster. ``activations`` and ``gradients`` are ``format`` where they are None.

    Gradients that the optimizer sees lie on the grid: ``distcomp.attach(model, optimizer,
    distcomp.fixed_point(format))`` sends them in their bits, without a second rounding.

    ``rank`` makes the noise of activations and gradients a rank's own; that of the weights is the same on all
    ranks, which must keep the same weights. In ``eval()`` activations are rounded to the nearest.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015. We differ: an output
    that saturates passes no gradient (the paper says nothing of it); the optimizer's own state (momentum)
    stays in float32.

    Raises DistcompError for an unknown format or rounding, or a model without layers to convert.
    """
    if rounding not in ROUNDINGS:
        raise DistcompError(f"fixed_point rounds stochastic or nearest, not {rounding!r}")
    formats = tuple(FixedPoint.of(given or format) for given in (format, activations, gradients))

    def plan(name: str, layer: nn.Module) -> Quantizers:
        shared, own = Key.of("precision", seed, name), Key.of("precision", seed, name, rank)
        return _quantizers(formats, exact, rounding, shared, own)

    return convert(model, plan, skip)


def _quantizers(
    formats: tuple[FixedPoint, ...], exact: bool, rounding: str, shared: Key, own: Key
) -> Quantizers:
    """Those of a layer; ``formats``: of weights, activations and gradients."""
    of_weights, of_activations, of_gradients = formats

    def rounder(format: FixedPoint, key: Key) -> RoundToFormat:
        return RoundToFormat(format, key if rounding == "stochastic" else None)

    return Quantizers(
        BitWidths(of_weights.bits, of_activations.bits, of_gradients.bits),
        {
            name: GridGradient(rounder(of_gradients, own.fold(name)), exact, of_weights.bits)
            for name in ("weight", "bias")
        },
        input_quantizer=Widen() if exact else None,
        output_quantizer=GridOutput(
            rounder(of_activations, own.fold("y")), rounder(of_gradients, own.fold("e"))
        ),
        # The key without the rank: replicas hold the same weights, so they must round them alike.
        weight_projection=rounder(of_weights, shared.fold("rest")),
    )


class RoundToFormat(nn.Module):
    """Rounding to a format; at random where a key is given, while training."""

    needs_weights = True
    """As a law at rest: it says nothing about the factors of a weight."""

    def __init__(self, format: FixedPoint, key: Key | None) -> None:
        super().__init__()
        self.format = format
        self.noise = None if key is None else Noise(key)

    def forward(self, x: Tensor) -> Tensor:
        """The numbers of the grid that stand for ``x``."""
        return self.later()(x)

    def later(self) -> Rounding:
        """A rounding whose random numbers are settled now, for use in backward."""
        return Rounding(self.format, self.noise.next_key() if self.noise and self.training else None)


class Rounding:
    """One rounding: a format and the key of its random numbers, if any."""

    def __init__(self, format: FixedPoint, key: Tensor | None) -> None:
        self.format = format
        self.key = key

    def __call__(self, x: Tensor) -> Tensor:
        return self.format.round(x, None if self.key is None else uniform_like(x, self.key))


class RoundedBack(torch.autograd.Function):
    """Forward: ``x`` in another type. Backward: the gradient, rounded to a grid, in the type of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding, dtype: torch.dtype) -> Tensor:
        ctx.rounding, ctx.dtype = rounding, x.dtype
        return x.to(dtype) if dtype != x.dtype else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rounded: Tensor = ctx.rounding(gradients[0])
        return rounded.to(ctx.dtype), None, None


class GridGradient(WeightQuantizer):
    """A parameter as it is (widened where sums are exact), whose gradient is rounded."""

    changes_dtype = True

    def __init__(self, gradient: RoundToFormat, exact: bool, bits: float) -> None:
        super().__init__()
        self.gradient = gradient
        self.exact = exact
        self.bits = bits

    @property
    def width(self) -> float:
        """Of the grid on which the latent weight is kept."""
        return self.bits

    def decode(self, latent: Tensor) -> Tensor:
        """The parameter that the layer computes with."""
        if not (self.training or torch.is_grad_enabled()) and not self.exact:
            return latent
        dtype = torch.float64 if self.exact and self.training else latent.dtype
        read: Tensor = RoundedBack.apply(latent, self.gradient.later(), dtype)  # type: ignore[no-untyped-call]
        return read


class Widen(nn.Module):
    """float64 inputs, for sums that are exact; in ``eval()`` nothing happens."""

    def forward(self, x: Tensor) -> Tensor:
        """What the layer multiplies."""
        return x.double() if self.training else x


class GridOutput(nn.Module):
    """Round what leaves a layer, and the error that comes back to it."""

    def __init__(self, output: RoundToFormat, error: RoundToFormat) -> None:
        super().__init__()
        self.output = output
        self.error = error

    def forward(self, y: Tensor) -> Tensor:
        """Outputs on the grid, as float32. A saturated output passes no gradient."""
        format = self.output.format
        inside = y.abs() <= format.half * format.spacing
        rounded = straight_through(y, self.output(y), inside).float()
        back: Tensor = RoundedBack.apply(rounded, self.error.later(), rounded.dtype)  # type: ignore[no-untyped-call]
        return back
