"""The parameters of a module as slices of a flat buffer, and what each is to a method."""

from __future__ import annotations

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
            if isinstance(part, NORMS):
                roles[id(parameter)] = "norm"
            elif isinstance(part, nn.Embedding | nn.EmbeddingBag):
                roles[id(parameter)] = "embedding"
    slices = {}
    for name, parameter in module.named_parameters():
        role = roles.get(id(parameter)) or ("matrix" if parameter.dim() >= 2 else "bias")
        slices[id(parameter)] = ParamSlice(name, tuple(parameter.shape), 0, parameter.numel(), role)
    return slices
