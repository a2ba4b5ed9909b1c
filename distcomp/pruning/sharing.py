"""Weights that share values: k-means on what lives, and training of the centroids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.files.k_means import Values, shared_values
from distcomp.parametrize import Order, Parametrization, Storage, chain, install, parameters, remove
from distcomp.parametrize.base import Tensors
from distcomp.parametrize.chain import chains
from distcomp.pruning.masks import OWNER, Mask, unwrapped, weights_of


class Codebook(Parametrization):
    """``w[j] = centroids[codes[j]]``, and zero where the code is 0: what is trained are the centroids.

    The gradient of a centroid is the sum of the gradients of its members. ``codes`` (int32: Gloo broadcasts
    no int16) has the shape of the tensor that is shared; where it stands for several tensors, it is flat,
    and ``shapes`` says theirs.
    """

    owner = "sharing"
    order = Order.CODE
    selects = True
    codes: Tensor

    def __init__(
        self, codes: Tensor, shapes: Sequence[tuple[int, ...]] | None = None, most: int = 256
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.shapes = shapes
        self.most = most

    @staticmethod
    def of(weight: Tensor | Tensors, most: int) -> Codebook:
        """The codebook of at most ``most`` values nearest to one tensor, or to several together."""
        tensors = (weight,) if isinstance(weight, Tensor) else weight
        return _codebook(tensors, _shared(tensors, most)[1], most)

    def decode(self, centroids: Tensor) -> Tensor | Tensors:
        """The shared tensor, or all of them."""
        shared = torch.cat([centroids.new_zeros(1), centroids])[self.codes.long()]
        if self.shapes is None:
            return shared
        pieces = torch.split(shared, [math.prod(shape) for shape in self.shapes])
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def right_inverse(self, weight: Tensor | Tensors) -> Tensor:
        """For codes as they are, the nearest centroids: the means of their members."""
        tensors = (weight,) if isinstance(weight, Tensor) else weight
        values = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        codes = self.codes.long().reshape(-1)
        if codes.shape != values.shape:
            raise DistcompError(
                f"a codebook of {codes.numel()} codes cannot stand for {values.numel()} numbers; make one "
                "for them"
            )
        count = int(codes.max())
        members = torch.bincount(codes, minlength=count + 1)[1:]
        sums = torch.zeros(count + 1, dtype=torch.float64, device=values.device)
        means = sums.scatter_add_(0, codes, values.double())[1:] / members.clamp(min=1)
        return means.to(values.dtype)

    def refit(self, weight: Tensor | Tensors) -> Codebook:
        """Another, of as many values at most, unless these codes hold the tensor exactly."""
        tensors = (weight,) if isinstance(weight, Tensor) else weight
        if [tuple(tensor.shape) for tensor in tensors] == (self.shapes or [tuple(self.codes.shape)]):
            held = self.decode(self.right_inverse(weight))
            kept = (held,) if isinstance(held, Tensor) else held
            if all(torch.equal(decoded, tensor) for decoded, tensor in zip(kept, tensors, strict=True)):
                return self
        return Codebook.of(weight, self.most).train(self.training)

    def storage(self, below: Storage, weight: Tensors) -> Storage:
        """A code for each number, of as many bits as the values and zero need, beside the values."""
        values = int(self.codes.max()) + 1
        return Storage(
            below.numbers, below.width, below.extra + self.codes.numel() * (values - 1).bit_length()
        )


def _shared(tensors: Tensors, most: int) -> tuple[Values, NDArray[np.int64]]:
    """Centroids of what lives in some tensors together, and all their codes, flat; 0 stands for zero."""
    flat = [tensor.detach().float().cpu().reshape(-1).numpy() for tensor in tensors]
    values = np.concatenate(flat)
    places = np.flatnonzero(values)
    centroids, codes = shared_values(values[places], most)
    every = np.zeros(values.size, np.int64)
    every[places] = codes + 1
    return centroids, every


def _codebook(tensors: Tensors, codes: NDArray[np.int64], most: int) -> Codebook:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    stored = torch.from_numpy(codes).to(torch.int32).to(tensors[0].device)
    return (
        Codebook(stored.view(shapes[0]), None, most) if len(shapes) == 1 else Codebook(stored, shapes, most)
    )


def share(model: nn.Module, bits: int = 5) -> nn.Module:
    """Let the active weights of each layer share ``2^bits`` values, which are trained from now on.

    Masks on plain weights are taken off and built in: zeros stay zero. What a structure stores shares values
    in the place of the weights; a quantizer goes on quantizing, and its masks stay. Parameters are new
    (``centroids``): make the optimizer, and DistributedDataParallel, afterwards. Layers with fewer active
    numbers than four times the centroids are left as they are. Returns the model.

    Source: Han et al., Deep Compression, ICLR 2016.
    """
    if not 1 <= bits <= 8:
        raise DistcompError(f"{bits} bits per shared weight are not possible here; choose 1 to 8")
    module = unwrapped(model)
    names = weights_of(module)
    for name in names:
        if any(isinstance(link, Codebook) for link in chain(module, name)):
            raise DistcompError(
                f"{name} shares its values already; "
                f"distcomp.parametrize.remove(model, {name!r}, 'sharing', densify=True) undoes that"
            )
    for _, _, masked in chains(module):
        if all(isinstance(link, Mask) for link in masked.links):
            remove(module, masked.name, OWNER)
    for name in names:
        _share(module, name, 1 << bits)
    return model


@torch.no_grad()
def _share(module: nn.Module, name: str, most: int) -> None:
    tensors = tuple(_living(tensor, chain(module, name)) for tensor in parameters(module, name))
    if sum(int(torch.count_nonzero(tensor)) for tensor in tensors) < 4 * most:
        return
    centroids, codes = _shared(tensors, most)
    install(module, name, _codebook(tensors, codes, most))
    (parameter,) = parameters(module, name)
    parameter.copy_(torch.from_numpy(centroids).to(parameter))


def _living(tensor: Tensor, links: tuple[nn.Module, ...]) -> Tensor:
    """A stored tensor, zero where it is masked."""
    for link in links:
        if isinstance(link, Mask) and link.mask.shape == tensor.shape:
            tensor = tensor * link.mask
    return tensor


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model as it computes: under their own names, masks and codebooks applied."""
    module = unwrapped(model)
    state: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        if isinstance(part, parametrize.ParametrizationList) or ".parametrizations." in f".{prefix}.":
            continue
        start = f"{prefix}." if prefix else ""
        own = {**part._parameters, **part._buffers}
        hidden = part._non_persistent_buffers_set
        state |= {f"{start}{n}": t.detach() for n, t in own.items() if t is not None and n not in hidden}
        for tensor in getattr(part, "parametrizations", {}):
            state[f"{start}{tensor}"] = getattr(part, tensor).detach()
    return state
