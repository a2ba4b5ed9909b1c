"""What makes a parametrization for a weight, for :func:`distcomp.structured.lc`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.parametrize import Parametrization, Storage
from distcomp.pruning.masks import Mask, keep_largest
from distcomp.pruning.sharing import Codebook
from distcomp.structured.factors import svd_of
from distcomp.structured.ranks import Rank


def codebook(values: int) -> Callable[[Tensor], Parametrization]:
    """``values`` shared values for each weight, by k-means; zeros stay zero."""
    if not 1 <= values <= 4096:
        raise DistcompError(f"a codebook has 1 to 4096 values, not {values}")
    return lambda weight: Codebook.of(weight, values)


def pruned(share: float) -> Callable[[Tensor], Parametrization]:
    """The ``share`` of largest magnitudes stays."""
    if not 0 < share <= 1:
        raise DistcompError(f"the share of weights that stays lies in (0, 1], not at {share}")

    def make(weight: Tensor) -> Parametrization:
        mask = Mask(weight)
        mask.mask.copy_(keep_largest(weight.abs(), max(1, round(share * weight.numel()))))
        return mask

    return make


def of_rank(rank: Rank) -> Callable[[Tensor], Parametrization]:
    """Factors of a rank, or of the rank that a share of the energy or ``"evbmf"`` chooses."""
    return lambda weight: svd_of(weight, rank)


class Ternary(Parametrization):
    """``w = s t`` with ``t`` in {-1, 0, 1}: theta is ``s``, one number, the codes are a buffer of two bits
    each.

    :meth:`refit` finds the nearest: with the k largest magnitudes nonzero, ``s`` is their mean, and k is the
    one of greatest ``(sum of those)^2 / k``.
    """

    owner = "structured"
    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    @staticmethod
    def of(weight: Tensor) -> Ternary:
        """Of the nearest ternary weight."""
        magnitudes, order = weight.abs().flatten().sort(descending=True, stable=True)
        gains = magnitudes.double().cumsum(0).square() / torch.arange(1, len(magnitudes) + 1)
        codes = torch.zeros(weight.numel(), dtype=torch.int8)
        kept = order[: int(gains.argmax()) + 1]
        codes[kept] = weight.flatten()[kept].sign().to(torch.int8)
        return Ternary(codes.view(weight.shape))

    def decode(self, scale: Tensor) -> Tensor:
        """``scale * codes``."""
        return scale * self.codes.to(scale.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The least squares scale of the codes."""
        nonzero = self.codes.abs().sum().clamp(min=1)
        return ((weight * self.codes).double().sum() / nonzero).to(weight.dtype).view(1)

    def refit(self, weight: Tensor | tuple[Tensor, ...]) -> Ternary:
        """The nearest, of any codes."""
        return Ternary.of(weight if isinstance(weight, Tensor) else weight[0])

    def storage(self, below: Storage, weight: tuple[Tensor, ...]) -> Storage:
        """A number, and two bits for each code (held as int8 in a state dict)."""
        return Storage(below.numbers, below.width, below.extra + 2 * self.codes.numel())
