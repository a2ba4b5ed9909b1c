"""Masks on a module's parameters, as parametrizations: ``state_dict`` holds them, other tools know them.

A pruned parameter ``weight`` becomes ``parametrizations.weight.original`` (the trained values) and
``parametrizations.weight.0.mask`` (bool). What the module computes with is ``original * mask``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.parametrized import own_class

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


class Mask(nn.Module):
    """``w = original * mask``. While ``dense_grad``, the gradient passes as if there were no mask.

    With ``dense_grad`` a dead weight receives the gradient of the weight that the module computed with
    (zero), so that it may come back: dynamic network surgery, regrowth. Without, its gradient is zero.
    """

    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool))
        self.dense_grad = False

    def forward(self, original: Tensor) -> Tensor:
        if self.dense_grad:
            dense_grad: Tensor = _Through.apply(original, self.mask)  # type: ignore[no-untyped-call]
            return dense_grad
        return original * self.mask


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
        """The trained values, dead ones included."""
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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation for a while; each part is then in the mode in which it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


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

    Raises DistcompError for a name that is no parameter, one that has a parametrization already, and a tied
    one.
    """
    module = unwrapped(model)
    owners = _owners(module)
    pruned: dict[str, Pruned] = {}
    for name in names:
        path, _, tensor = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            owner = nn.Module()
        if parametrize.is_parametrized(owner, tensor):
            raise DistcompError(f"{name} has a parametrization already; remove it before pruning")
        parameter = owner._parameters.get(tensor)
        if parameter is None:
            known = ", ".join(one for one, _ in module.named_parameters())
            raise DistcompError(f"there is no parameter {name!r} to prune; there are: {known}")
        if owners[id(parameter)] > 1:
            raise DistcompError(f"{name} is shared by several layers, which one mask cannot serve; untie it")
        mask = make(parameter)
        _parametrize(owner, tensor, parameter, mask)
        pruned[name] = Pruned(name, owner, tensor, mask)
    _keep_from_ddp(module)
    return pruned


@torch.no_grad()
def _parametrize(owner: nn.Module, tensor: str, parameter: nn.Parameter, mask: Mask) -> None:
    """Register with a stand-in, then put the parameter itself in its place.

    torch would call ``parameter.set_()``, which takes the parameter from a DistributedDataParallel that is
    there already: its hooks would never be called again.
    """
    setattr(owner, tensor, _stand_in(parameter))
    parametrize.register_parametrization(owner, tensor, mask)
    original = owner.parametrizations[tensor].original  # type: ignore[index, union-attr]
    parameter.copy_(original)
    owner.parametrizations[tensor].original = parameter  # type: ignore[index, union-attr]


def _stand_in(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _owners(module: nn.Module) -> dict[int, int]:
    """How many places hold each parameter."""
    count: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _keep_from_ddp(module: nn.Module) -> None:
    """Masks are alike on all ranks as they are: a DDP made later need not send them in every forward."""
    masks = [f"{path}.mask" for path, part in module.named_modules() if isinstance(part, Mask)]
    already = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    ignored = [*already, *(name for name in masks if name not in already)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]


def materialize(model: nn.Module) -> nn.Module:
    """Take all masks off; each parameter is what the module computed with, under its old name again."""
    module = unwrapped(model)
    for part in list(module.modules()):
        for tensor, chain in list(getattr(part, "parametrizations", {}).items()):
            if all(isinstance(one, Mask) for one in chain):
                _unparametrize(part, tensor)
    return model


@torch.no_grad()
def _unparametrize(owner: nn.Module, tensor: str) -> None:
    parameter = owner.parametrizations[tensor].original  # type: ignore[index, union-attr]
    owner.parametrizations[tensor].original = _stand_in(parameter)  # type: ignore[index, union-attr]
    own_class(owner)
    parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)
    parameter.copy_(getattr(owner, tensor))
    setattr(owner, tensor, parameter)


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
