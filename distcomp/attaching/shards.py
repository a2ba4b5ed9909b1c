"""A rank's own shards of an FSDP2 model, for what averages models across replicas of the same shard.

FSDP2 cuts a parameter along one dimension into pieces of ``ceil(rows / shards)`` rows, the last ones shorter
or empty. To those who average, a shard is a parameter of its own: blocks and chunks begin with it, anchors,
residuals and momentum are as long as it is, and it is exchanged with those who hold the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcomp.attaching.slices import slices_of
from distcomp.attaching.target import Target, is_sharded
from distcomp.attaching.weights import Weights
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice

if TYPE_CHECKING:  # takes seconds to import, and who is attached to has imported it
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class ShardedWeights(Weights):
    """As :class:`Weights`, of what this rank holds of each parameter; empty shards take no part.

    What FSDP has gathered is dropped before shards are read or written: a forward that no backward followed
    leaves the root's weights gathered, and the next one would compute with them.
    """

    def __init__(self, module: nn.Module, shards: dist.ProcessGroup) -> None:
        self._shards = shards
        super().__init__(module)

    def _local(self) -> Mapping[str, Tensor]:
        for part in self._module.modules():
            if is_sharded(part):
                cast("FSDPModule", part).reshard()
        return {name: cast("DTensor", p.detach()).to_local() for name, p in self.parameters.items()}

    def _layout(self) -> Layout:
        return self.layout_of(dist.get_rank(self._shards))

    def layout_of(self, shard: int) -> Layout:
        """What lies where in the flat buffer of those who hold shard number ``shard``."""
        slices, count = slices_of(self._module), dist.get_world_size(self._shards)
        cut = [_cut(slices[id(p)], cast("DTensor", p), shard, count) for p in self.parameters.values()]
        return Layout(tuple(param for param in cut if param.numel))

    def everywhere(self, finite: Tensor) -> Tensor:
        return finite_in_all_shards(finite, self._shards)

    def root_mean(self, square: Tensor) -> float:
        sums = torch.stack([square[0].double(), torch.full_like(square[0].double(), self.layout.numel)])
        dist.all_reduce(sums, group=self._shards)
        return float((sums[0] / sums[1]) ** 0.5)


def _cut(whole: ParamSlice, parameter: DTensor, shard: int, count: int) -> ParamSlice:
    """A parameter's shard, as a parameter."""
    (placement,) = parameter.placements
    dim = getattr(placement, "dim", 0)
    shape = list(parameter.shape)
    rows = math.ceil(shape[dim] / count)
    shape[dim] = max(0, min(rows, shape[dim] - shard * rows))
    return replace(whole, shape=tuple(shape), numel=math.prod(shape))


def averaged_weights(target: Target) -> Weights:
    """What is averaged of a model: its trained weights, or this rank's shards of them."""
    if target.shards is None:
        return Weights(target.module, target.ignored)
    return ShardedWeights(target.module, target.shards)


def finite_in_all_shards(finite: Tensor, shards: dist.ProcessGroup) -> Tensor:
    """Whether all shards were finite (bool): replicas of one shard learn nothing of the others."""
    if dist.get_world_size(shards) == 1:
        return finite
    count = finite.int().reshape(1)
    dist.all_reduce(count, dist.ReduceOp.MIN, group=shards)
    return count[0].bool()


def refuse_averaging_shards(averaging: Averaging | MultiLevel, target: Target) -> None:
    """Raise DistcompError where no replicas are named, or where shards would not take turns alike."""
    if target.replicas is None or target.shards is None:
        raise DistcompError(
            f"{averaging} averages models, and nothing says which ranks hold the same shard of this one; "
            "name the mesh's other dimension: distcomp.attach(..., replicas=mesh['replicate'])"
        )
    if any(level.gradients_until for level in averaging.levels()):
        raise DistcompError(
            "post_local_sgd averages gradients across the replicas at first, and FSDP hands over those "
            "inside each alone; use local_sgd or diloco"
        )
    weights = ShardedWeights(target.module, target.shards)
    layouts = [weights.layout_of(shard) for shard in range(dist.get_world_size(target.shards))]
    for level in averaging.levels():
        counts = [len(level.fragments_of(layout)) if layout.numel else 0 for layout in layouts]
        if len(set(counts)) > 1 or 0 in counts:
            raise DistcompError(
                f"the shards of this model are averaged in {', '.join(map(str, counts))} fragments: the "
                "smallest is too short to be cut like the others; shard the model over fewer ranks, or ask "
                "for fewer fragments"
            )
