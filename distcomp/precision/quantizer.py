"""What all quantizers of weights are: parametrizations whose theta is the latent weight."""

from __future__ import annotations

from torch import Tensor

from distcomp.parametrize import Order, Parametrization, Storage

FULL = 32


class WeightQuantizer(Parametrization):
    """``W = q(w)`` of a latent weight w of the same shape. A subclass writes ``decode``."""

    owner = "precision"
    order = Order.QUANTIZE

    def right_inverse(self, weight: Tensor) -> Tensor:
        """An assigned value becomes the latent weight."""
        return weight

    @property
    def width(self) -> float:
        """Bits of a number of what ``decode`` gives in ``eval()``; 32 where it gives the latent weight."""
        return FULL

    def scales(self, weight: Tensor) -> int:
        """How many float32 numbers the bits need beside them to be a weight again."""
        return 0

    def storage(self, below: Storage, weight: tuple[Tensor, ...]) -> Storage:
        """Codes and scales, or what the latent weight takes where that is less (a structure's is)."""
        codes = Storage(weight[0].numel(), self.width, FULL * self.scales(weight[0]))
        return codes if codes.bits < below.bits else below
