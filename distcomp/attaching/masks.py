"""What a pruner asks of the other ranks, while a method is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distcomp.attaching.observed import pruners_of
from distcomp.attaching.protocol import Sync
from distcomp.attaching.target import Target
from distcomp.averaging.base import Averaging
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.from_compressor import from_compressor
from distcomp.runtime.aggregation import Aggregator
from distcomp.runtime.driver import context_of
from distcomp.runtime.unanimous import Numbers

if TYPE_CHECKING:
    from distcomp.pruning.pruner import Pruner


class Consensus:
    """Means and numbers of all ranks, over the attached method's own line: the ledger counts them."""

    def __init__(self, sync: Sync, device: torch.device) -> None:
        self.replicated = sync.replicated
        self._sync = sync
        self._device = device
        self._asked = 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a flat float32 tensor over the ranks."""
        return self._ask(from_compressor(Identity()), x)

    def numbers(self, own: int) -> list[int]:
        """Every rank's number, in rank order."""
        numbers: list[int] = self._ask(
            Numbers(own), torch.zeros(1, device=self._device, dtype=torch.float32)
        ).tolist()
        return numbers

    def _ask(self, aggregator: Aggregator, x: Tensor) -> Tensor:
        self._asked += 1
        layout = Layout.of([("masks", (x.numel(),))])
        context = context_of(self._sync.session.channel, layout, self._asked, "masks")
        return self._sync.exchange(aggregator, x, {}, context).result().estimate


def check_masks(method: Any, target: Target) -> None:
    """Raise DistcompError for another model's pruner, a sharded one's, and averaging beside the computing."""
    parameters = {id(parameter) for parameter in target.module.parameters()}
    for pruner in pruners_of(method):
        if target.shards is not None:
            raise DistcompError("weights that are sharded cannot be pruned here; use DistributedDataParallel")
        if any(id(one.parameter) not in parameters for one in pruner.pruned.values()):
            raise DistcompError("the pruner is of another model than the one attached to; make one for it")
        if isinstance(method, Averaging) and method.overlap:
            raise DistcompError("masks may change during an exchange that overlaps; use overlap=0")


def join(module: nn.Module, sync: Sync) -> list[Pruner]:
    """Let the pruners of the attached method ask the other ranks."""
    pruners = pruners_of(sync.method)
    device = next(module.parameters()).device
    for pruner in pruners:
        pruner.consensus = Consensus(sync, device)
    return pruners
