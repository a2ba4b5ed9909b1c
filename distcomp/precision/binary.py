"""Weights, and activations, of one bit: BinaryConnect, BNN and XNOR-Net."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.precision.convert import BitWidths, Quantizers, convert
from distcomp.precision.noise import Noise, sign, straight_through
from distcomp.precision.quantizer import FULL, WeightQuantizer
from distcomp.randomness import Key

ENDS = ("first", "last")
"""Layers that stay in float32, as in most papers: the least of the work, and the most sensitive."""


def binary_connect(
    model: nn.Module,
    *,
    stochastic: bool = False,
    glorot: bool = False,
    skip: tuple[str, ...] = (),
    seed: int = 0,
    rank: int = 0,
) -> nn.Module:
    """Compute with weights of one bit, and update real ones that are kept within [-H, H].

    ::

        W = H sign(w),     or  H with probability clip((w/H + 1) / 2, 0, 1), else -H      (stochastic)
        w <- clip(w - update, -H, H)

    H = 1, or with ``glorot`` ``sqrt(6 / (fan_in + fan_out)) / 2``, as in the authors' later code. sign(0) =
    +1. The gradient of W is that of w. In ``eval()`` a stochastic model computes with its real weights, as
    the paper does. ``rank`` makes the noise a rank's own.

    Source: Courbariaux et al., "BinaryConnect", NeurIPS 2015.
    """

    def plan(name: str, layer: nn.Module) -> Quantizers:
        h = glorot_scale(layer) if glorot else 1.0
        noise = Noise(Key.of("precision", seed, name, rank)) if stochastic else None
        return Quantizers(BitWidths(1), {"weight": BinaryWeight(h, noise)}, weight_projection=Clip(h))

    return convert(model, plan, skip)


def bnn(model: nn.Module, *, skip: tuple[str, ...] = ENDS) -> nn.Module:
    """Compute with signs of weights and of inputs: ``W = sign(w)``, ``a = sign(x)``.

    ::

        dL/dw = dL/dW, and w <- clip(w, -1, 1) after each step;    dL/dx = dL/da 1[|x| <= 1]

    sign(0) = +1. The first layer takes its input as it is (the paper: 8-bit pixels) and, unless ``skip`` says
    otherwise, stays in float32, as does the last. Put a batch norm before each layer: signs carry no scale.
    :class:`distcomp.precision.ShiftBatchNorm` and :class:`distcomp.precision.ShiftAdaMax` are the paper's own
    norm and optimizer, without multiplications. :func:`distcomp.precision.pack` makes the trained layers
    really small and fast.

    Source: Hubara et al., "Binarized neural networks", NeurIPS 2016. We differ: the paper binarizes the first
    and the last layer's weights, too (``skip=()`` does, and binarizes the first layer's input as well).
    """

    def plan(name: str, layer: nn.Module) -> Quantizers:
        return Quantizers(
            BitWidths(1, 1), {"weight": BinaryWeight(1.0, None)}, Sign(), weight_projection=Clip(1.0)
        )

    return convert(model, plan, skip)


def xnor_net(model: nn.Module, *, input_scale: bool = True, skip: tuple[str, ...] = ENDS) -> nn.Module:
    """Compute with signs, scaled back by the mean magnitudes of each filter and of what it sees.

    ::

        W = alpha sign(w),  alpha = mean|w| of each output filter;    y = (sign(x) * W) K + bias
        K = box filter of (channel mean of |x|)
        dL/dw_i = dL/dW_i (1/n + alpha 1[|w_i| <= 1]),                dL/dx = dL/da 1[|x| <= 1]

    ``input_scale=False`` drops K, as most implementations do. K is a constant to the gradient. The paper's
    block is norm, sign, convolution, pool: put the batch norm before each layer.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016, algorithm 1 and section 3.2. We differ from the authors'
    code, and agree with the paper's equations: weights are neither centred per filter nor clamped to [-1, 1],
    and the gradient is not scaled by the number of weights.
    """

    def plan(name: str, layer: nn.Module) -> Quantizers:
        input_quantizer = SignAndScale(layer) if input_scale else Sign()
        output_quantizer = (
            TimesScale(input_quantizer, layer) if isinstance(input_quantizer, SignAndScale) else None
        )
        return Quantizers(BitWidths(1, 1), {"weight": ScaledBinary()}, input_quantizer, output_quantizer)

    return convert(model, plan, skip)


def glorot_scale(layer: nn.Module) -> float:
    """``sqrt(6 / (fan_in + fan_out)) / 2``, half of what Glorot draws weights up to."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    area = math.prod(weight.shape[2:])
    return 0.5 * math.sqrt(6 / (area * (weight.shape[0] + weight.shape[1])))


class Clip(nn.Module):
    """Latent weights stay within +-limit: beyond it they would never turn again."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, w: Tensor) -> Tensor:
        """The clipped weight."""
        return w.clamp(-self.limit, self.limit)


class BinaryWeight(WeightQuantizer):
    """``h sign(w)``, at random where noise is given; the gradient passes straight through."""

    def __init__(self, h: float, noise: Noise | None) -> None:
        super().__init__()
        self.h = h
        self.noise = noise

    @property
    def width(self) -> float:
        """1; with noise, ``eval()`` computes with the latent weight."""
        return 1 if self.noise is None else FULL

    def decode(self, w: Tensor) -> Tensor:
        """The weight that is computed with."""
        if self.noise is None:
            return straight_through(w, self.h * sign(w))
        if not self.training:
            return w
        chance = ((w / self.h + 1) / 2).clamp(0, 1)
        return straight_through(w, self.h * sign(chance - self.noise(w) - TINIEST))


TINIEST = 2.0**-26
"""Less than any two random numbers differ by: chance 0 never gives +h, chance 1 always does."""


class Sign(nn.Module):
    """``sign(x)``; the gradient passes where |x| <= 1."""

    def forward(self, x: Tensor) -> Tensor:
        """+1 and -1."""
        return straight_through(x, sign(x), x.abs() <= 1)


class XnorSign(torch.autograd.Function):
    """``alpha sign(w)`` with the gradient of XNOR-Net's algorithm."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        alpha = w.abs().mean(dim=tuple(range(1, w.dim())), keepdim=True)
        ctx.save_for_backward(w, alpha)
        return alpha * sign(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        w, alpha = ctx.saved_tensors
        n = w[0].numel()
        # As in the paper's algorithm: of alpha's derivative each weight has its own share alone, 1/n.
        back: Tensor = gradients[0] * (1 / n + alpha * (w.abs() <= 1))
        return back


class ScaledBinary(WeightQuantizer):
    """XNOR-Net's weights: see :func:`xnor_net`."""

    @property
    def width(self) -> float:
        """1."""
        return 1

    def scales(self, weight: Tensor) -> int:
        """alpha of each filter."""
        return weight.shape[0]

    def decode(self, w: Tensor) -> Tensor:
        """``alpha sign(w)``, alpha of each output filter."""
        scaled: Tensor = XnorSign.apply(w)  # type: ignore[no-untyped-call]
        return scaled


class SignAndScale(nn.Module):
    """Signs of the input; K, what their magnitudes were, waits for :class:`TimesScale`."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """+1 and -1."""
        with torch.no_grad():
            self.scale = self.magnitudes(x)
        return straight_through(x, sign(x), x.abs() <= 1)

    def magnitudes(self, x: Tensor) -> Tensor:
        """K: the mean of |x| over what each output sees."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x.abs().mean(-1, keepdim=True)
        size: tuple[int, ...] = layer.kernel_size
        batched = x if x.dim() == len(size) + 2 else x[None]
        mean = batched.abs().mean(1, keepdim=True)
        # Stride, padding and dilation are the layer's: one K for each output, of what that output sees.
        box = torch.full((1, 1, *size), 1 / math.prod(size), dtype=x.dtype, device=x.device)
        convolve: Any = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(size)]
        k: Tensor = convolve(mean, box, None, layer.stride, layer.padding, layer.dilation)
        return k if batched is x else k[0]


class TimesScale(nn.Module):
    """What leaves a layer, times K; the bias is not scaled."""

    source: SignAndScale
    layer: Any

    def __init__(self, source: SignAndScale, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.__dict__["layer"] = layer

    def forward(self, y: Tensor) -> Tensor:
        """``(y - bias) K + bias``."""
        # Taken away as it is read: a K that is left over would scale another step's output.
        k, self.source.scale = self.source.scale, None
        assert k is not None
        bias: Tensor | None = self.layer.bias
        if bias is None:
            return y * k
        if not isinstance(self.layer, nn.Linear):
            bias = bias.view(-1, *[1] * len(self.layer.kernel_size))
        return (y - bias) * k + bias
