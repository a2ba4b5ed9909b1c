"""FSDP2: the flat buffer of a module's gradients read as its parameters, with names and shapes.

FSDP pads each parameter to a multiple of the ranks, cuts it in as many pieces of rows, and lays the first
pieces of all parameters before the second ones. Which parameters, in what order, and that rows are what is
cut, the model tells; a parameter that is not trained has no gradient and is not in the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from distcomp.attaching.slices import slices_of
from distcomp.errors import DistcompError
from distcomp.kernels.pieces import Moves, move
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.row_owners import cut_rows
from distcomp.private_torch import FSDPGroup


@dataclass(frozen=True, eq=False)
class ParameterBuffer:
    """Where a module's parameters lie in the buffer that FSDP reduces."""

    layout: Layout
    """Whole parameters, in the order of the buffer."""
    numel: int
    """Elements of the buffer, padding included."""
    owners: int
    moves: Moves
    """From the buffer to whole parameters."""
    own: tuple[Moves, ...]
    """By owner: from whole parameters to its piece of the buffer."""

    @property
    def shard(self) -> Layout:
        """An owner's piece of the buffer: the rows of each parameter, padded to the most that one has."""
        return padded_shard(self.layout, self.owners)

    def parameters(self, buffer: Tensor) -> Tensor:
        """The parameters that lie in a buffer, whole and end to end."""
        x = buffer.new_empty(self.layout.numel)
        move(buffer, x, self.moves)
        return x

    def piece(self, x: Tensor, owner: int) -> Tensor:
        """An owner's piece of the buffer, from whole parameters; padding is zero."""
        piece = x.new_zeros(self.numel // self.owners)
        move(x, piece, self.own[owner])
        return piece


def parameter_buffers(
    model: nn.Module, groups: Mapping[FSDPGroup, tuple[str, nn.Module]], owners: int
) -> dict[str, ParameterBuffer]:
    """That of each flat buffer, by its name. Raises DistcompError where a parameter is not cut by rows."""
    named = slices_of(model)
    return {name: parameter_buffer(_trained(group, named), owners) for group, (name, _) in groups.items()}


def _trained(group: FSDPGroup, named: Mapping[int, ParamSlice]) -> list[ParamSlice]:
    """The parameters of a buffer of gradients."""
    from torch.distributed.tensor import DTensor

    parameters = [cast(nn.Parameter, getattr(module, attribute)) for module, attribute in group.members]
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            raise DistcompError(
                "FSDP has gathered the weights at the moment; attach before a forward, or call "
                "model.reshard() on every FSDP module first"
            )
        if getattr(parameter.placements[0], "dim", 0) != 0:
            raise DistcompError(
                f"{named[id(parameter)].name} is cut along another dimension than its first, and rows are "
                "what a method of whole parameters is told; leave shard_placement_fn out, or use a method "
                "that works element by element"
            )
    return [named[id(parameter)] for parameter in parameters if parameter.requires_grad]


def parameter_buffer(parameters: list[ParamSlice], owners: int) -> ParameterBuffer:
    """That of parameters that ``owners`` share by rows."""
    layout = Layout(tuple(parameters))
    padded = [math.ceil(p.shape[0] / owners) * math.prod(p.shape[1:]) for p in parameters]
    piece = sum(padded)
    read, own = [], []
    for owner in range(owners):
        begin, moves = 0, []
        for param, at, numel in zip(parameters, layout.offsets, padded, strict=True):
            first, shape = cut_rows(param.shape, owner, owners)
            if math.prod(shape):
                whole_at = at + first * math.prod(shape[1:])
                read.append((owner * piece + begin, whole_at, math.prod(shape)))
                moves.append((whole_at, begin, math.prod(shape)))
            begin += numel
        own.append(Moves(tuple(moves)))
    return ParameterBuffer(layout, owners * piece, owners, Moves(tuple(read)), tuple(own))


def padded_shards(
    model: nn.Module, groups: Mapping[FSDPGroup, tuple[str, nn.Module]], shards: int
) -> dict[str, Layout]:
    """The trained parameters' shards in each flat buffer, padded to the longest: what replicas exchange."""
    named = slices_of(model)
    layouts = {}
    for group, (name, _) in groups.items():
        layouts[name] = padded_shard(Layout(tuple(_trained(group, named))), shards)
    return layouts


def padded_shard(layout: Layout, shards: int) -> Layout:
    """What one of ``shards`` ranks has of whole parameters: rows of each, padded to the most that one has."""
    return Layout(tuple(_padded(param, shards) for param in layout.slices))


def _padded(param: ParamSlice, shards: int) -> ParamSlice:
    shape = (math.ceil(param.shape[0] / shards), *param.shape[1:])
    return ParamSlice(param.name, shape, 0, math.prod(shape), param.role)
