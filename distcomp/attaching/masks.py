"""What a pruner asks of the other ranks, while a method is attached."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.attaching.ddp import GradientSync
from distcomp.attaching.parameters import ParameterSync
from distcomp.attaching.session import Session
from distcomp.attaching.target import Target
from distcomp.averaging.base import Averaging
from distcomp.collectives import AllGather, Rounds
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, State, StepContext
from distcomp.methods.from_compressor import from_compressor
from distcomp.payload import Part, Payload
from distcomp.pruning.pruner import Pruner
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation, Aggregator
from distcomp.runtime.executor import Executor


@dataclass(frozen=True)
class Numbers:
    """Every rank says a number of 63 bits; the estimate holds them all, in rank order."""

    own: int
    propagates_nonfinite: bool = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        payload = Payload.empty((Part("digest", torch.int64, 1),), x.device)
        payload["digest"].fill_(self.own)
        payloads: list[Payload] = yield AllGather(payload)
        found = torch.cat([one["digest"] for one in payloads])
        return AggregateResult(found, lambda: found, state)


class Consensus:
    """Means and numbers of all ranks, over the attached method's own line: the ledger counts them."""

    def __init__(self, session: Session, sync: GradientSync | ParameterSync, device: torch.device) -> None:
        self.replicated = isinstance(sync, GradientSync)
        self._session = session
        self._sync = sync
        self._device = device
        self._executor = Executor(session.channel, device, beside=False)
        self._asked = 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a flat float32 tensor over the ranks."""
        return self._ask(from_compressor(Identity()), x)

    def numbers(self, own: int) -> list[int]:
        """Every rank's number, in rank order."""
        found: list[int] = self._ask(Numbers(own), torch.zeros(1, device=self._device)).tolist()
        return found

    def _ask(self, aggregator: Aggregator, x: Tensor) -> Tensor:
        self._sync.idle()
        self._asked += 1
        layout = Layout.of([("masks", (x.numel(),))])
        key = Key.of("masks", self._asked)
        aggregation = Aggregation(
            aggregator, x, {}, StepContext(self._session.rank, self._session.size, layout, self._asked, key)
        )
        self._executor.start(aggregation)()
        assert aggregation.result is not None
        return aggregation.result.estimate


def pruners_of(method: Any) -> list[Pruner]:
    """The pruners of a method and of those within it."""
    if isinstance(method, Pruner):
        return [method]
    if isinstance(method, tuple):
        return [pruner for one in method for pruner in pruners_of(one)]
    if not is_dataclass(method) or isinstance(method, type):
        return []
    return [pruner for field in fields(method) for pruner in pruners_of(getattr(method, field.name))]


def check(method: Any, target: Target) -> None:
    """Raise DistcompError for another model's pruner, a sharded one's, and averaging beside the computing."""
    parameters = {id(parameter) for parameter in target.module.parameters()}
    for pruner in pruners_of(method):
        if target.shards is not None:
            raise DistcompError("weights that are sharded cannot be pruned here; use DistributedDataParallel")
        if any(id(one.parameter) not in parameters for one in pruner.pruned.values()):
            raise DistcompError("the pruner is of another model than the one attached to; make one for it")
        if isinstance(method, Averaging) and method.overlap:
            raise DistcompError("masks may change during an exchange that overlaps; use overlap=0")


def join(
    method: Any, module: nn.Module, session: Session, sync: GradientSync | ParameterSync
) -> list[Pruner]:
    """Let the pruners of an attached method ask the other ranks."""
    pruners = pruners_of(method)
    device = next(module.parameters()).device
    for pruner in pruners:
        pruner.consensus = Consensus(session, sync, device)
    return pruners
