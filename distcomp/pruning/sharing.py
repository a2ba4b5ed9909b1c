"""Weights that share values: k-means on what lives, and training of the centroids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.files.k_means import shared_values
from distcomp.pruning.masks import materialize, unwrapped, weights_of


class Codebook(nn.Module):
    """``w[j] = centroids[codes[j]]``, and zero where the code is 0: what is trained are the centroids.

    The gradient of a centroid is the sum of the gradients of its members.
    """

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, centroids: Tensor) -> Tensor:
        return torch.cat([centroids.new_zeros(1), centroids])[self.codes.long()]


def share(model: nn.Module, bits: int = 5) -> nn.Module:
    """Let the living weights of each layer share ``2^bits`` values, which are trained from now on.

    Masks are taken off and built in: zeros stay zero. Parameters are new (``centroids``): make the optimizer,
    and DistributedDataParallel, afterwards. Layers with fewer living weights than four times the centroids
    are left as they are. Returns the model.
    """
    if not 1 <= bits <= 8:
        raise DistcompError(f"{bits} bits per shared weight are not possible here; choose 1 to 8")
    module = unwrapped(materialize(model))
    for name in weights_of(module):
        path, _, tensor = name.rpartition(".")
        owner = module.get_submodule(path)
        weight = getattr(owner, tensor).detach()
        values = weight.float().cpu().reshape(-1).numpy()
        places = np.flatnonzero(values)
        if len(places) < 4 << bits:
            continue
        centroids, codes = shared_values(values[places], 1 << bits)
        every = np.zeros(values.size, np.int64)
        every[places] = codes + 1
        book = Codebook(torch.from_numpy(every).view(weight.shape).to(torch.int16).to(weight.device))
        requires = getattr(owner, tensor).requires_grad
        parametrize.register_parametrization(owner, tensor, book, unsafe=True)
        original = nn.Parameter(torch.from_numpy(centroids).to(weight), requires_grad=requires)
        owner.parametrizations[tensor].original = original  # type: ignore[index, union-attr]
    return model


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
