"""Which models can be averaged, and what is refused with its reason."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer

from distcomp.attaching.optimizers import needed
from distcomp.attaching.shards import averaged_weights
from distcomp.attaching.target import Target
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.topology import resolve
from distcomp.errors import DistcompError


def refuse_averaging(target: Target, averaging: Averaging | MultiLevel, optimizer: Optimizer | None) -> None:
    """What cannot be served, named with its reason; warns where a condition of the paper does not hold."""
    if target.ddp is not None and target.ddp.find_unused_parameters:
        raise DistcompError(
            "find_unused_parameters=True makes DDP ask all ranks in every backward, which averaging is to "
            "avoid; wrap the model with find_unused_parameters=False, or attach to the plain module"
        )
    if target.ddp is None and any(level.gradients_until for level in averaging.levels()):
        raise DistcompError(
            "post_local_sgd averages gradients at first, and a plain module hands them to nobody; wrap the "
            "model in DistributedDataParallel, or use local_sgd"
        )
    for name, part in target.module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            raise DistcompError(
                f"{name} is a SyncBatchNorm, which asks all ranks in every forward; use BatchNorm"
            )
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise DistcompError(
            "ZeroRedundancyOptimizer hands out parameters that now differ between ranks; use the one inside"
        )
    if any(level.optimizer_state != "keep" or level.moment_periods for level in averaging.levels()):
        needed(optimizer)
    size = dist.get_world_size(target.group)
    _refuse_to_go_on(target, averaging)
    warning = averaging.conditions(averaged_weights(target).layout, size).get("warning")
    if warning and dist.get_rank(target.group) == 0:
        warnings.warn(warning, stacklevel=4)


def _refuse_to_go_on(target: Target, averaging: Averaging | MultiLevel) -> None:
    """Refuse ``on_failure="continue"`` where training cannot go on without a lost rank."""
    if all(level.on_failure == "stop" for level in averaging.levels()):
        return
    rounds = any(level.holds_rounds and level.lateness is not None for level in averaging.levels())
    if rounds and (isinstance(averaging, MultiLevel) or target.shards is not None):
        raise DistcompError(
            "rounds that workers may miss are held by one averaging of whole models; use on_failure='stop' "
            "with several levels, and with sharded models"
        )
    on_cpu = all(parameter.device.type == "cpu" for parameter in target.module.parameters())
    if target.ddp is not None or not on_cpu or dist.get_backend(target.group) != "gloo":
        raise DistcompError(
            "on_failure='continue' needs a plain module on the CPU and Gloo: DDP and NCCL "
            "stop when a rank dies"
        )


def edges_of(averaging: Averaging, target: Target) -> frozenset[tuple[int, int]]:
    """The edges that need connections of their own: a gossip's that goes on when a neighbour dies."""
    if averaging.on_failure == "stop" or averaging.holds_rounds:
        return frozenset()
    assert isinstance(averaging, Gossip)
    return resolve(averaging.topology, dist.get_world_size(target.group)).edges
