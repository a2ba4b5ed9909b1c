"""What a pruner asks of the other ranks, while a method is attached."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.exchange import Gather, Talk
from distcomp.layout import Layout
from distcomp.methods.base import Outcome, State, Turn
from distcomp.methods.lift import lift
from distcomp.payload import Part, Payload
from distcomp.pruning.pruner import Pruner
from distcomp.randomness import Key
from distcomp.sync.averaging import Averaging
from distcomp.sync.ddp import GradientSync
from distcomp.sync.lane import Lane
from distcomp.sync.link import Link
from distcomp.sync.models import ModelSync
from distcomp.sync.target import Target
from distcomp.transports.conversation import Conversation, Talker


@dataclass(frozen=True)
class Numbers:
    """Every rank says a number of 63 bits; the estimate holds them all, in rank order."""

    own: int
    transparent: bool = True

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        payload = Payload.empty((Part("digest", torch.int64, 1),), x.device)
        payload["digest"].fill_(self.own)
        payloads: list[Payload] = yield Gather(payload)
        found = torch.cat([one["digest"] for one in payloads])
        return Outcome(found, lambda: found, state)


class Consensus:
    """Means and numbers of all ranks, over the attached method's own line: the ledger counts them."""

    def __init__(self, link: Link, sync: GradientSync | ModelSync, device: torch.device) -> None:
        self.replicated = isinstance(sync, GradientSync)
        self._link = link
        self._sync = sync
        self._device = device
        self._lane = Lane(link.channel, device, beside=False)
        self._asked = 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a flat float32 tensor over the ranks."""
        return self._ask(lift(Identity()), x)

    def numbers(self, own: int) -> list[int]:
        """Every rank's number, in rank order."""
        found: list[int] = self._ask(Numbers(own), torch.zeros(1, device=self._device)).tolist()
        return found

    def _ask(self, talker: Talker, x: Tensor) -> Tensor:
        self._sync.idle()
        self._asked += 1
        layout = Layout.of([("masks", (x.numel(),))])
        key = Key.of("masks", self._asked)
        talk = Conversation(talker, x, {}, Turn(self._link.rank, self._link.size, layout, self._asked, key))
        self._lane.start(talk)()
        assert talk.outcome is not None
        return talk.outcome.estimate


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


def join(method: Any, module: nn.Module, link: Link, sync: GradientSync | ModelSync) -> list[Pruner]:
    """Let the pruners of an attached method ask the other ranks."""
    pruners = pruners_of(method)
    device = next(module.parameters()).device
    for pruner in pruners:
        pruner.consensus = Consensus(link, sync, device)
    return pruners
