"""FSDP2: a method in the place of each module's reduce-scatter, or across the replicas of a hybrid mesh.

``fully_shard`` reduces the gradients of each module it wraps as one flat buffer: every parameter padded to a
multiple of the ranks and cut in as many pieces, the first pieces of all parameters before the second ones. No
name and no shape comes with it, so a method sees one long piece per owner
(:func:`distcomp.methods.reduce_scatter.owned_layout`); one that needs them sees the parameters that
:mod:`distcomp.attaching.fsdp_rows` reads in the buffer, and FSDP is given the rank's own rows.

The exchange runs where FSDP runs its own: inside backward, before the module's sharded gradients are made, on
a GPU in FSDP's stream. Gradients that accumulate (``set_requires_gradient_sync(False)``) are not exchanged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distcomp.attaching.bucket import Scaler
from distcomp.attaching.fsdp_gather import PREFIX, WeightGathers, gather_units
from distcomp.attaching.fsdp_reduction import Among, BufferGroups, BufferReduction
from distcomp.attaching.protocol import Sync
from distcomp.attaching.record import Iteration
from distcomp.attaching.session import Session
from distcomp.attaching.shards import finite_in_all_shards, refuse_averaging_shards
from distcomp.attaching.slices import local
from distcomp.attaching.target import Target, is_sharded
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.errors import DistcompError
from distcomp.methods.base import ByParameter, Method
from distcomp.methods.weight_gather import WeightGather
from distcomp.private_torch import FSDPGroup, fsdp_divide_factor, fsdp_group
from distcomp.runtime.driver import commit, finite_in_each
from distcomp.runtime.pipeline import Timeline
from distcomp.training import TrainingClock

if TYPE_CHECKING:  # takes seconds to import, and who is attached to has imported it
    from torch.distributed.fsdp import FSDPModule


class Unit:
    """The reductions of one FSDP module: by what is attached, or as FSDP does them.

    FSDP takes these two calls and has no public way to give them back, so they stay, once and for ever. With
    ``replicas``, what reduce-scatters leave is averaged over those; they remain FSDP's own unless a method is
    attached for them, too.
    """

    def __init__(self, name: str, module: FSDPModule, replicas: dist.ProcessGroup | None) -> None:
        self.name = name
        self._module = ref(cast("nn.Module", module))  # who keeps the units keeps no module alive
        self.attached: FSDPSync | None = None
        self.replicas = replicas
        try:
            module.set_custom_reduce_scatter(self)  # type: ignore[arg-type]  # the base class is private
            if replicas is not None:
                module.set_all_reduce_hook(self.after)
        except (AttributeError, ValueError) as error:
            raise DistcompError(
                f"the reductions of {name} cannot be taken over: {error}; FSDP2 of PyTorch 2.9 or newer is "
                "needed, with one mesh for all parameters of a module"
            ) from error

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent and received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """FSDP's reduce-scatter."""
        if self.attached is None or not self.attached.reduces_inside:
            work: dist.Work | None = dist.reduce_scatter_tensor(
                output_tensor, input_tensor, op, group, async_op
            )
            return work
        factor = _factor(op, dist.get_world_size(group))
        output_tensor.copy_(self.attached.reduce_inside(self.name, input_tensor) * factor)
        return None

    def after(self, output: Tensor) -> None:
        """What FSDP calls with a module's reduced piece: average it over the replicas, in place.

        With a divide factor the user divides by what is his own count, and is owed the sum.
        """
        assert self.replicas is not None
        size = dist.get_world_size(self.replicas)
        if self.attached is None:
            output.mul_(1.0 / size)
            dist.all_reduce(output, group=self.replicas)
        else:
            output.copy_(self.attached.reduce_across(self.name, output))
        module = self._module()
        if module is not None and fsdp_divide_factor(module) is not None:
            output.mul_(float(size))


def _factor(op: Any, size: int) -> float:
    """What FSDP expects, as a multiple of the mean. Where it asks for a sum it divides by itself, before or
    after; a factor given to ``set_gradient_divide_factor`` comes within the operation."""
    if op == dist.ReduceOp.AVG:
        return 1.0
    if op == dist.ReduceOp.SUM:
        return float(size)
    if op == dist.ReduceOp.PREMUL_SUM:
        return size * float(op.__getstate__()[1])
    raise DistcompError(
        f"FSDP asks for a reduction by {op}, and a method gives a mean or a sum; leave the gradients' "
        "reduction as it is, or set its factor by set_gradient_divide_factor"
    )


_UNITS: WeakKeyDictionary[nn.Module, Unit] = WeakKeyDictionary()


def groups_of(model: nn.Module) -> dict[FSDPGroup, tuple[str, nn.Module]]:
    """Each flat buffer of the model: its parameters, and the name and module it is known by.

    Modules that were wrapped as a list, ``fully_shard([norm, output])``, share one, under the first's name.
    Raises DistcompError for parameters of one module on several meshes.
    """
    groups: dict[FSDPGroup, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if not is_sharded(module):
            continue
        try:
            group = fsdp_group(module)
        except ValueError as error:
            raise DistcompError(
                f"the reductions of {name or 'root'} cannot be taken over: {error}; wrap the model with one "
                "mesh for all parameters of a module"
            ) from error
        if group is not None:
            groups.setdefault(group, (name or "root", module))
    return groups


def units_of(
    groups: Mapping[FSDPGroup, tuple[str, nn.Module]], replicas: dist.ProcessGroup | None
) -> list[Unit]:
    """The unit of every flat buffer, put there the first time.

    Raises DistcompError where a module was attached before with other replicas.
    """
    units = []
    for name, module in groups.values():
        if module not in _UNITS:
            _UNITS[module] = Unit(name, cast("FSDPModule", module), replicas)
        if _UNITS[module].replicas is not replicas:
            raise DistcompError(
                "this FSDP model was attached before with other replicas, which FSDP cannot forget; wrap the "
                "model again, then attach"
            )
        units.append(_UNITS[module])
    return units


INSIDE = "inside/"
"""Begins the names under which a checkpoint keeps what is owed inside, where another method acts across
replicas."""


def _reductions(
    target: Target, groups: BufferGroups, method: Method, session: Session
) -> tuple[BufferReduction | None, BufferReduction | None]:
    """Who reduces inside, among those who hold the model together, and across replicas: None is FSDP's own
    reduce-scatter, or nobody."""
    assert target.shards is not None
    count = dist.get_world_size(target.shards)
    if target.replicas is None:
        among = Among.all_of(session)
        return BufferReduction(method, target.module, groups, among, count, across=False), None
    if target.inside is None:
        among = Among.all_of(session)
        return None, BufferReduction(method, target.module, groups, among, count, across=True)
    within = Among.members_of(target.shards)
    across = Among.members_of(target.replicas)
    return (
        BufferReduction(target.inside, target.module, groups, within, count, across=False),
        BufferReduction(method, target.module, groups, across, count, across=True),
    )


class FSDPSync(Sync):
    """Carries the buffers of each backward through ``method``, one after the other.

    State is committed when the backward is over, and only if the gradients of every rank were finite. With
    error feedback every rank keeps a residual as long as the *whole* model in float32 (``stats()`` says how
    many bytes), for it owes to the owners of all pieces; across replicas as long as its own pieces.
    """

    def __init__(
        self,
        target: Target,
        method: Method,
        session: Session,
        clock: TrainingClock,
        seed: int = 0,
        scaler: Scaler | None = None,
        weights: WeightGather | None = None,
    ) -> None:
        super().__init__(method, session, clock)
        self._session = session
        self._model = target.module
        self._seed = seed
        self._scaler = scaler
        assert target.shards is not None
        self._shards = target.shards
        groups = groups_of(target.module)
        self._inside, self._across = _reductions(target, groups, method, session)
        self._reductions = [one for one in (self._inside, self._across) if one is not None]
        self._sent_before: int | None = None
        self._begin_iteration()
        self._units = units_of(groups, target.replicas)
        among = self._inside.among if self._inside is not None else Among.all_of(session)
        self._weights = (
            WeightGathers(target.module, groups, weights, among, self.executor, seed) if weights else None
        )
        self._gather_units = gather_units(groups) if weights else []
        if target.replicas is not None:
            _begin_alike(self._model, target.replicas)
        self._put_in_units(self)

    @torch.no_grad()
    def gather(self, name: str, shard: Tensor) -> Tensor:
        """All ranks' shards of a flat buffer of weights, in rank order (float32)."""
        if self.error is not None:
            raise self.error
        assert self._weights is not None
        self._exchange_begins()
        try:
            return self._weights.gather(name, shard, self.iterations)
        except BaseException as error:
            self.error = error
            raise

    @property
    def reduces_inside(self) -> bool:
        """Whether reduce-scatters are ours."""
        return self._inside is not None

    def reduce_inside(self, name: str, buffer: Tensor) -> Tensor:
        """The estimate of a buffer's mean over those who hold the model together (float32): this rank's
        piece."""
        return self._reduced(self._inside, name, buffer)

    def reduce_across(self, name: str, piece: Tensor) -> Tensor:
        """The estimate of a piece's mean over the replicas (float32)."""
        return self._reduced(self._across, name, piece)

    def _reduced(self, reduction: BufferReduction | None, name: str, buffer: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        assert reduction is not None
        try:
            return self._reduce(reduction, name, buffer)
        except BaseException as error:
            self.error = error
            raise

    @torch.no_grad()
    def _reduce(self, reduction: BufferReduction, name: str, buffer: Tensor) -> Tensor:
        self._exchange_begins()
        self.clock.exchange_begins()
        self._ready_s = time.perf_counter()
        scale = (
            self._scaler.scale(torch.ones((), device=buffer.device, dtype=torch.float32))
            if self._scaler is not None
            else None
        )
        x = buffer.float() if scale is None else buffer.float() / scale
        agreed = reduction.begun(name, x, self.iterations, self._seed, self.executor(buffer.device))
        self._timeline.spans += agreed.timeline.spans
        estimate = reduction.ended(name, agreed)
        return estimate if scale is None else estimate * scale

    def _exchange_begins(self) -> None:
        """Bytes count from the first exchange after the last iteration: a gather, or a reduction."""
        if self._sent_before is None:
            self._sent_before = self._session.ledger.total_bytes

    def _begin_iteration(self) -> None:
        for reduction in self._reductions:
            reduction.talked = []
        self._timeline = Timeline()
        self._ready_s = 0.0
        self._sent_before = None

    def forward_begins(self) -> None:
        """What a backward that broke off has left is no part of the next iteration."""
        if self.under_way:
            self._begin_iteration()

    @property
    def under_way(self) -> bool:
        return any(reduction.talked for reduction in self._reductions)

    @torch.no_grad()
    def backward_ended(self) -> None:
        """Keep the new states if every rank was finite in every buffer."""
        if self.error is not None:
            return
        talked = [aggregation for reduction in self._reductions for aggregation in reduction.talked]
        finite = self._everywhere(finite_in_each(talked))
        for reduction in self._reductions:
            commit(reduction.states, reduction.talked, lambda _: finite)
        sent = self._session.ledger.total_bytes - (self._sent_before or 0)
        self.last = Iteration(self.iterations, self._timeline, self._ready_s, sent)
        self.iterations += 1
        self._begin_iteration()

    def _everywhere(self, finite: Tensor) -> Tensor:
        """Whether all ranks were finite."""
        return finite if self._across is None else finite_in_all_shards(finite, self._shards)

    def close(self) -> None:
        """From now on FSDP reduces as before; replicas are averaged in the gradients' own type."""
        self._put_in_units(None)
        super().close()

    def _put_in_units(self, sync: FSDPSync | None) -> None:
        for unit in self._units:
            unit.attached = sync
        for gather_unit in self._gather_units:
            gather_unit.attached = sync

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients accumulate, whole on every rank, as FSDP has it."""
        model = cast("FSDPModule", self._model)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def report(self) -> dict[str, Any]:
        """What this rank keeps between steps, and in how many pieces a buffer is owned."""
        held_bytes = self._weights.state_bytes if self._weights is not None else 0
        return {
            "state_bytes": sum(one.states.held_bytes for one in self._reductions) + held_bytes,
            "shards": dist.get_world_size(self._shards),
        }

    def state_dict(self) -> dict[str, Any]:
        self.idle()
        return {
            "iterations": self.iterations,
            "seed": self._seed,
            "shards": dist.get_world_size(self._shards),
            "state": self._owed() | (self._weights.state_dict() if self._weights is not None else {}),
        }

    def expected_state(self, saved: Mapping[str, Any]) -> None:
        """Raises DistcompError where something is owed by another number of ranks or shards, and buffers are
        interleaved by them; what is owed for whole parameters is handed on. What is held of the weights
        begins anew there, with a warning.

        What buffers hold is known when FSDP first reduces one; another shape is refused then.
        """
        by_parameter = self._across is None and self._inside is not None and self._inside.whole
        if _owed(saved["state"]) and not by_parameter and not self._is_of_these_shards(saved):
            shards, size = dist.get_world_size(self._shards), dist.get_world_size()
            raise DistcompError(
                f"the checkpoint is of {saved['world_size']} ranks and {saved.get('shards', 'no')} shards, "
                f"and here are {size} and {shards}: what is owed lies interleaved by shard and cannot be "
                "handed on; go on without it (do not load it), or on as many ranks"
            )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.idle()
        self.iterations, self._seed = saved["iterations"], saved["seed"]
        owed = _owed(saved["state"])
        inside = {name.removeprefix(INSIDE): one for name, one in owed.items() if name.startswith(INSIDE)}
        other = {name: one for name, one in owed.items() if not name.startswith(INSIDE)}
        for reduction in self._reductions:
            reduction.states.load(inside if self._is_beside(reduction) else other)
        if self._weights is not None:
            self._weights.load_state_dict(saved["state"], self._is_of_these_shards(saved))

    def _owed(self) -> dict[str, dict[str, Tensor]]:
        """What the methods keep, by parameter."""
        return {
            (INSIDE if self._is_beside(reduction) else "") + name: leaves
            for reduction in self._reductions
            for name, leaves in reduction.states.by_parameter().items()
        }

    def _is_beside(self, reduction: BufferReduction) -> bool:
        """Whether it is the one inside, beside another one across replicas."""
        return reduction is self._inside and self._across is not None

    def _is_of_these_shards(self, saved: Mapping[str, Any]) -> bool:
        here = (dist.get_world_size(self._shards), dist.get_world_size())
        return (saved.get("shards"), saved["world_size"]) == here


def _owed(state: ByParameter) -> dict[str, Mapping[str, Tensor]]:
    """What the method keeps; the rest is of the gathered weights."""
    return {name: leaves for name, leaves in state.items() if not name.startswith(PREFIX)}


def _begin_alike(model: nn.Module, replicas: dist.ProcessGroup) -> None:
    """All replicas take the first one's weights and buffers, as DistributedDataParallel does."""
    first = dist.get_global_rank(replicas, 0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(local(tensor).detach(), first, group=replicas)


def refuse_sharded(method: Method | Averaging | MultiLevel | str, target: Target) -> None:
    """What an FSDP model cannot be served by, named with its reason."""
    if isinstance(method, str):
        raise DistcompError(
            f"{method!r} needs DistributedDataParallel's buckets, and an FSDP model has none; use a method "
            "of distcomp's, such as 'identity' or 'qsgd:bits=4'"
        )
    if isinstance(method, Method):
        return
    if target.inside is not None:
        raise DistcompError(
            f"{method} averages models across replicas, and gradients inside are FSDP's own; give replicas= "
            "the group alone"
        )
    refuse_averaging_shards(method, target)
    if any(module in _UNITS and _UNITS[module].replicas is not None for module in target.module.modules()):
        raise DistcompError(
            "the gradients of this FSDP model were averaged across replicas before, which FSDP cannot "
            "forget; wrap the model again, then attach"
        )
