"""The parameters of a module as slices of a flat buffer, and what each is to a method."""

from __future__ import annotations

import math

from torch import Tensor, nn

from distcomp.layout import ParamSlice

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be distributed: all of it, or its shard (a view)."""
    if not hasattr(tensor, "to_local"):
        return tensor
    own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # of a DTensor
    return own


def slices_of(module: nn.Module) -> dict[int, ParamSlice]:
    """Each parameter's segment, by identity. Tied parameters have one, under their first name."""
    roles: dict[int, str] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            role = _special_role(part)
            if role is not None:
                roles[id(parameter)] = role
    slices = {}
    for name, parameter in module.named_parameters():
        role = roles.get(id(parameter)) or _plain_role(parameter.dim())
        slices[id(parameter)] = ParamSlice(name, tuple(parameter.shape), 0, parameter.numel(), role)
    return slices


def slice_in(part: nn.Module, name: str, shape: tuple[int, ...]) -> ParamSlice:
    """The segment of a parameter of ``part`` itself, of which no more is known than its name and shape."""
    role = _special_role(part) or _plain_role(len(shape))
    return ParamSlice(name, shape or (1,), 0, math.prod(shape), role)


def _special_role(part: nn.Module) -> str | None:
    """What all parameters of a module are, where the module says it."""
    if isinstance(part, NORMS):
        return "norm"
    return "embedding" if isinstance(part, nn.Embedding | nn.EmbeddingBag) else None


def _plain_role(dim: int) -> str:
    return "matrix" if dim >= 2 else "bias"
