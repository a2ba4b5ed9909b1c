"""Masks on a module's parameters, as parametrizations: ``state_dict`` holds them, other tools know them.

A pruned parameter ``weight`` becomes ``parametrizations.weight.original`` (the trained values) and
``parametrizations.weight.0.mask`` (bool). What the module computes with is ``original * mask``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcomp.errors import DistcompError
from distcomp.parametrize import Order, Parametrization, Storage, chain, evaluating, install, parameters
from distcomp.parametrize.chain import apply, chains, removal
from distcomp.parametrize.links import label

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
"""Whose weights are pruned unless parameters are named."""


OWNER = "pruning"

__all__ = [
    "LAYERS",
    "Mask",
    "Pruned",
    "digest",
    "evaluating",
    "keep_largest",
    "materialize",
    "put_masks",
    "unwrapped",
    "weights_of",
]


class Mask(Parametrization):
    """``w = original * mask``. While ``dense_grad``, the gradient passes as if there were no mask.

    With ``dense_grad`` a pruned weight receives the gradient of the weight that the module computed with
    (zero), so that it may come back: dynamic network surgery, regrowth. Without, its gradient is zero.
    """

    owner = OWNER
    order = Order.PRUNE
    selects = True
    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool))
        self.dense_grad = False

    def decode(self, original: Tensor) -> Tensor:
        """``original * mask``."""
        if self.dense_grad:
            dense_grad: Tensor = _Through.apply(original, self.mask)  # type: ignore[no-untyped-call]
            return dense_grad
        return original * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is kept of an assigned value: itself."""
        return weight

    def storage(self, below: Storage, weight: tuple[Tensor, ...]) -> Storage:
        """A bit for each weight, and only the numbers that live, where one number is stored for each
        weight."""
        total = self.mask.numel()
        numbers = int(self.mask.sum()) if below.numbers == total else below.numbers
        return Storage(numbers, below.width, below.extra + total)


class _Through(torch.autograd.Function):
    """Multiplies by a mask on the way there, by nothing on the way back."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, mask: Tensor) -> Tensor:
        return original * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True, eq=False)
class Pruned:
    """A parameter with a mask on it."""

    name: str
    """As it was called before: ``fc.weight``."""
    module: nn.Module
    tensor: str
    parametrization: Mask

    @property
    def parameter(self) -> nn.Parameter:
        """The trained values, pruned ones included."""
        original = self.module.parametrizations[self.tensor].original  # type: ignore[index, union-attr]
        assert isinstance(original, nn.Parameter)
        return original

    @property
    def mask(self) -> Tensor:
        return self.parametrization.mask

    @property
    def wire_name(self) -> str:
        """As ``named_parameters()`` calls it now."""
        *path, last = self.name.split(".")
        return ".".join([*path, "parametrizations", last, "original"])


def unwrapped(model: nn.Module) -> nn.Module:
    """The module under torch.compile's and DistributedDataParallel's wrappers."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else inner


def weights_of(module: nn.Module) -> list[str]:
    """The names of the weights of all linear layers, convolutions and embeddings."""
    return [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, part in module.named_modules()
        if isinstance(part, LAYERS)
    ]


def put_masks(
    model: nn.Module, names: Iterable[str], make: Callable[[Tensor], Mask] = Mask
) -> dict[str, Pruned]:
    """Put a mask of ones on each of the parameters; by name.

    A mask stacks with a quantizer. Raises DistcompError for a name that is no parameter, one that is masked
    or stored in another form (a structure, a codebook) already, and a tied one.
    """
    module = unwrapped(model)
    pruned: dict[str, Pruned] = {}
    for name in names:
        for link in chain(module, name):
            if not isinstance(link, Parametrization) or link.order <= Order.STRUCTURE or link.owner == OWNER:
                raise DistcompError(
                    f"{name} has a parametrization already, {label(link)}, over which a pruner cannot choose "
                    "weight by weight; remove it before pruning"
                )
        path, _, tensor = name.rpartition(".")
        owner = module.get_submodule(path)
        parameter = parameters(module, name)[0]
        mask = make(parameter)
        install(model, name, mask)
        pruned[name] = Pruned(name, owner, tensor, mask)
    _keep_from_ddp(module)
    return pruned


def _keep_from_ddp(module: nn.Module) -> None:
    """Masks are alike on all ranks as they are: a DDP made later need not send them in every forward."""
    masks = [f"{path}.mask" for path, part in module.named_modules() if isinstance(part, Mask)]
    already = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    ignored = [*already, *(name for name in masks if name not in already)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]


def materialize(model: nn.Module, *, densify: bool = False) -> nn.Module:
    """Take all masks off; each parameter is what the module computed with, under its old name again.

    Other parametrizations stay. Raises DistcompError, and changes nothing, where one below a mask cannot hold
    what is pruned (signs have no zero): take that off first, or let ``densify=True`` do so.
    """
    apply(
        [
            removal(model, where.name, OWNER, densify=densify)
            for _, _, where in chains(model)
            if any(isinstance(link, Mask) for link in where.links)
        ]
    )
    return model


def digest(masks: Mapping[str, Tensor]) -> int:
    """63 bits of a hash over names, shapes and masks: what ranks compare when a mask has changed."""
    state = hashlib.blake2b(digest_size=8)
    for name in sorted(masks):
        mask = masks[name]
        state.update(f"{name}:{tuple(mask.shape)};".encode())
        state.update(mask.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(state.digest(), "little") & (2**63 - 1)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` largest scores; among equals the lower index stays. Minus infinity never does.

    Shape and device of ``scores``.
    """
    flat = scores.reshape(-1)
    order = torch.sort(flat, descending=True, stable=True).indices[: max(0, count)]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = flat[order] > -torch.inf
    return mask.view_as(scores)
