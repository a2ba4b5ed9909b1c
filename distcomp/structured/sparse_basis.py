"""Sparse convolutions (Liu 2015): a basis of channels, bases of space, and coefficients most of which are
zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.parametrize import Storage, chain, parameters
from distcomp.parametrize.base import Tensors
from distcomp.pruning.masks import unwrapped
from distcomp.structured.structure import (
    Patterns,
    Structure,
    chosen_layers,
    install_structures,
    weight_name,
    wide,
)
from distcomp.training import Listener, clock_of


class SparseBasis(Structure):
    """``W[o, i, t] = sum_j P[i, j] sum_r S[o, j, r] Q[j, r, t]``, with S sparse.

    theta: ``P [in, in]``, ``S [out, in, taps]``, ``Q [in, taps, taps]``. ``right_inverse`` is exact: P are
    singular vectors of the channel unfolding, Q[j] those of the j-th channel of ``P^T W``. While ``support``
    is set (by :meth:`SparseConvolution.freeze`), coefficients outside it stay zero.

    Source: Liu et al., Sparse convolutional neural networks, CVPR 2015.
    """

    support: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        taps = int(torch.Size(shape[2:]).numel())
        self.register_buffer("support", torch.ones(shape[0], shape[1], taps, dtype=torch.bool))

    def decode(self, channels: Tensor, coefficients: Tensor, space: Tensor) -> Tensor:
        """The weight."""
        kept = coefficients * self.support
        return torch.einsum("ij,ojr,jrt->oit", channels, kept, space).view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two orthonormal bases and the weight's coefficients in them."""
        w = wide(weight).flatten(2)
        channels = torch.linalg.svd(w.transpose(0, 1).flatten(1), full_matrices=True)[0]
        turned = torch.einsum("ij,oit->jot", channels, w)
        space = torch.linalg.svd(turned, full_matrices=True)[2]  # [in, taps, taps]
        coefficients = torch.einsum("jot,jrt->ojr", turned, space)
        return channels.to(weight.dtype), coefficients.to(weight.dtype), space.to(weight.dtype)

    def storage(self, below: Storage, weight: Tensors) -> Storage:
        """The bases, the coefficients of the support, and a bit for each of all."""
        total = self.support.numel()
        return Storage(below.numbers - total + int(self.support.sum()), below.width, below.extra + total)


class SparseConvolution(Listener):
    """See :func:`sparse_convolution`."""

    def __init__(self, model: nn.Module, strength: float, layers: Patterns) -> None:
        if strength <= 0:
            raise DistcompError(f"sparse coefficients need a strength above 0, not {strength}; 1e-2 is usual")
        self.model, self.strength, self.frozen = unwrapped(model), strength, False
        self.names = [weight_name(name) for name, part in chosen_layers(model, layers)]
        self._clock = clock_of(model)
        self._clock.listen(self)

    def _theta(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        channels, coefficients, space = parameters(self.model, name)
        return channels, coefficients, space

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Soft threshold the coefficients by rate times strength, and norm the bases again."""
        if self.frozen:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name in self.names:
            channels, coefficients, space = self._theta(name)
            if id(coefficients) not in rates:
                continue
            threshold = rates[id(coefficients)] * self.strength
            coefficients.copy_(coefficients.sign() * (coefficients.abs() - threshold).clamp(min=0))
            columns, rows = channels.norm(dim=0).clamp(min=1e-12), space.norm(dim=2).clamp(min=1e-12)
            channels.div_(columns)
            space.div_(rows[:, :, None])
            coefficients.mul_(columns[None, :, None] * rows[None])

    @torch.no_grad()
    def freeze(self) -> float:
        """From now on zeros stay zero and the others train without a threshold. Returns the share of
        zeros."""
        zeros = total = 0
        for name in self.names:
            coefficients = self._theta(name)[1]
            (link,) = (link for link in chain(self.model, name) if isinstance(link, SparseBasis))
            link.support.copy_(coefficients != 0)
            zeros, total = zeros + int((coefficients == 0).sum()), total + coefficients.numel()
        self.frozen = True
        self._clock.leave(self)
        return zeros / total


def sparse_convolution(
    model: nn.Module, strength: float = 1e-2, *, layers: Patterns = None
) -> SparseConvolution:
    """Write convolutions in bases of channels and of space, and make the coefficients sparse while training.

    A proximal step after each optimizer step: ``S = soft_threshold(S, rate * strength)``; the columns of P
    and the rows of Q have length 1 again, S takes their lengths. ``.freeze()`` keeps the zeros; then
    fine-tune. More numbers are trained and exchanged than the weight has: what becomes small is the stored
    model.

    Call it before the optimizer and DistributedDataParallel are made, on the model that the loop calls.
    Dense layers stay as they are. Returns the driver. Raises DistcompError for a strength of 0 or less,
    without a convolution, and for layers that have a structure.
    """
    if strength <= 0:
        raise DistcompError(f"sparse coefficients need a strength above 0, not {strength}; 1e-2 is usual")
    names = [name for name, layer in chosen_layers(model, layers) if not isinstance(layer, nn.Linear)]
    if not names:
        raise DistcompError("none of the layers named is a convolution; sparse bases are of convolutions")
    install_structures(model, names, lambda layer, weight: SparseBasis(tuple(weight.shape)))
    return SparseConvolution(model, strength, names)
