"""FSDP2: one method's exchanges of a model's gradients, to the owners of their pieces or across replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from distcomp.attaching.fsdp_rows import ParameterBuffer, padded_shards, parameter_buffers
from distcomp.attaching.session import Session
from distcomp.collectives import Group, Rounds
from distcomp.collectives.rounds import within
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.reduce_scatter import owned_layout, to_shards
from distcomp.methods.row_owners import needs_parameters, to_row_owners
from distcomp.private_torch import FSDPGroup
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation, Aggregator
from distcomp.runtime.driver import Exchange, exchange
from distcomp.runtime.executor import Executor
from distcomp.runtime.states import States

BufferGroups = Mapping[FSDPGroup, tuple[str, nn.Module]]
"""Each flat buffer of a model, and the name and module it is known by."""


@dataclass(frozen=True)
class Among:
    """Those of a session's ranks among whom something is exchanged; ``group`` None: all."""

    rank: int
    size: int
    group: Group | None = None

    @staticmethod
    def all_of(session: Session) -> Among:
        return Among(session.rank, session.size)

    @staticmethod
    def members_of(group: dist.ProcessGroup) -> Among:
        """Of a session of all ranks of the job."""
        members = tuple(dist.get_process_group_ranks(group))
        return Among(dist.get_rank(group), len(members), members)

    def exchange(
        self, method: Aggregator, x: Tensor, state: State, about: tuple[Layout, int, int], executor: Executor
    ) -> Exchange:
        """Begin to exchange ``x`` among them. ``about``: its layout, the step, and the run's seed."""
        layout, step, seed = about
        context = StepContext(self.rank, self.size, layout, step, Key.of(seed, step))
        held = method if self.group is None else Within(method, self.group)
        return exchange(held, x, state, context, executor)


@dataclass(frozen=True)
class Within:
    """An exchange that is held inside a group."""

    method: Aggregator
    group: Group

    @property
    def propagates_nonfinite(self) -> bool:
        return self.method.propagates_nonfinite

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return within(self.group, self.method.aggregate(x, state, context))


class BufferReduction:
    """How ``method`` reduces the flat buffers of a model's gradients among ``among``: each piece to its owner
    or, ``across``, what a rank owns with those who own the same."""

    def __init__(
        self, method: Method, model: nn.Module, groups: BufferGroups, among: Among, shards: int, across: bool
    ) -> None:
        self.among, self._owners = among, 1 if across else among.size
        self.whole: dict[str, ParameterBuffer] = {}
        """The parameters of each buffer, for a method that sees them."""
        self._known: dict[str, Layout] = {}
        if needs_parameters(method) and across:
            self._known = padded_shards(model, groups, shards)
        elif needs_parameters(method):
            self.whole = parameter_buffers(model, groups, shards)
        self._talks = method if across else to_row_owners(method) if self.whole else to_shards(method)
        self.states = States(self._talks)
        self.talked: list[Aggregation] = []
        """The exchanges of this iteration."""

    def begun(self, name: str, x: Tensor, step: int, seed: int, executor: Executor) -> Exchange:
        """Begin to reduce a buffer (float32)."""
        layout, whole = self._layout(name, x.numel()), self.whole.get(name)
        x = x if whole is None else whole.parameters(x)
        about = (layout, step, seed)
        agreed = self.among.exchange(self._talks, x, self.states.of(layout, x.device), about, executor)
        self.talked.append(agreed.aggregation)
        return agreed

    def ended(self, name: str, agreed: Exchange) -> Tensor:
        """The estimate (float32): this rank's piece, or all of it across replicas."""
        estimate, whole = agreed.result().estimate, self.whole.get(name)
        return estimate if whole is None else whole.piece(estimate, self.among.rank)

    def _layout(self, name: str, numel: int) -> Layout:
        if name not in self._known:
            whole = self.whole.get(name)
            self._known[name] = whole.layout if whole is not None else owned_layout(name, numel, self._owners)
        known = self._known[name]
        expected = self.whole[name].numel if name in self.whole else known.numel
        if expected != numel:
            raise DistcompError(
                f"the buffer of {name} held {expected} elements and now holds {numel}: some parameters "
                "had no gradient, and nothing tells which; call "
                "model.set_reduce_scatter_unused_params(True) on every FSDP module"
            )
        return known
