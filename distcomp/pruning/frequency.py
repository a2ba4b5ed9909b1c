"""Pruning in the frequency domain: surgery on the DCT coefficients of each kernel, band by band."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.parametrize import Order
from distcomp.pruning.masks import Mask, unwrapped
from distcomp.pruning.pruner import Pruner
from distcomp.pruning.surgery import Draws, Surgery, check_rarity

LAWS = ("rising", "linear", "flat")


def dct_basis(size: int) -> Tensor:
    """The orthonormal DCT-II: ``B[k, i] = c_k cos(pi (2 i + 1) k / (2 n))``; ``B B^T = 1`` (float64)."""
    k, i = torch.arange(size).double()[:, None], torch.arange(size).double()[None]
    basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


class FrequencyMask(Mask):
    """``w = B^T (F * mask) B`` for every kernel: what is trained, masked and sent are coefficients F.

    The transform is orthonormal: the gradient of F is that of w, transformed, and SGD moves the same weights.
    """

    order = Order.STRUCTURE
    selects = False
    rows: Tensor
    columns: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        for name, size in (("rows", like.shape[-2]), ("columns", like.shape[-1])):
            self.register_buffer(name, dct_basis(size).to(like), persistent=False)

    def decode(self, original: Tensor) -> Tensor:
        """``B^T (F * mask) B``."""
        return self.rows.T @ super().decode(original) @ self.columns

    def restore(self, *theta: Tensor) -> Tensor:
        """The kernels of all coefficients."""
        return self.rows.T @ theta[0] @ self.columns

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The coefficients of a weight."""
        return self.rows @ weight @ self.columns.T


@dataclass(frozen=True)
class Bands:
    """How a layer's threshold grows with the frequency u = (i + j) / (k1 + k2 - 2) of a coefficient.

    ::

        factor(u) = low + (high - low) g(u);    rising: g = 1 - (1 - u^a)^b;    linear: g = u;    flat: g = 1

    ``rising`` is the distribution of Kumaraswamy, a Beta-like curve in closed form. The paper's own law is
    not public: the choice is ours.
    """

    law: str = "rising"
    low: float = 0.5
    high: float = 1.5
    a: float = 1.0
    b: float = 2.0

    def __post_init__(self) -> None:
        if self.law not in LAWS or not 0 <= self.low <= self.high or min(self.a, self.b) <= 0:
            raise DistcompError(f"bands need a law of {', '.join(LAWS)}, 0 <= low <= high, a > 0 and b > 0")

    def factors(self, height: int, width: int) -> Tensor:
        """``[height, width]``, float32."""
        i, j = torch.arange(height)[:, None], torch.arange(width)[None]
        u = (i + j).float() / max(1, height + width - 2)
        curves = {"rising": 1 - (1 - u**self.a) ** self.b, "linear": u, "flat": torch.ones_like(u)}
        return self.low + (self.high - self.low) * curves[self.law]


@dataclass(frozen=True)
class FrequencySurgery(Surgery):
    """Dynamic network surgery on coefficients: ``base factor(u)`` in place of a layer's base."""

    bands: Bands

    def mask_for(self, parameter: Tensor) -> Mask:
        return FrequencyMask(parameter)

    def bound(self, base: Tensor, magnitudes: Tensor) -> Tensor:
        return base * self.bands.factors(*magnitudes.shape[-2:]).to(magnitudes)


def frequency(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    rate: float = 0.5,
    *,
    bands: Bands | None = None,
    gamma: float = 1e-3,
    power: float = 1.0,
    until: int = 10_000,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Prune the DCT coefficients of convolution kernels, high frequencies sooner, and splice them again.

    ``rate``, ``gamma``, ``power``, ``until``: as for :func:`distcomp.pruning.dns`. ``bands``: how the
    thresholds change with the frequency, ``Bands()`` where None. Where ``names`` is None: all 2-D
    convolutions whose kernels are larger than 1 x 1.

    Source: Liu et al., Frequency-domain dynamic pruning, NeurIPS 2018. No code is public; the law of the
    bands is ours, and an option.
    """
    check_rarity(gamma, power)
    module = unwrapped(model)
    spatial = [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, part in module.named_modules()
        if isinstance(part, nn.Conv2d) and part.weight.shape[-1] * part.weight.shape[-2] > 1
    ]
    chosen = spatial if names is None else list(names)
    flat = [name for name in chosen if name not in spatial]
    if flat:  # named, but without a plane of frequencies
        raise DistcompError(f"{flat[0]} is no 2-D convolution of kernels above 1 x 1; leave it out of names")
    criterion = FrequencySurgery(Draws(seed, gamma, power, until), rate, bands or Bands())
    return Pruner(model, optimizer, criterion, chosen, seed)
