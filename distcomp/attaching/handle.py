"""How does a method meet *my* model and optimizer, and leave again?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.attaching import masks
from distcomp.attaching.agreement import Loads
from distcomp.attaching.arguments import check_arguments, check_optimizer, warn_of_rounding
from distcomp.attaching.audit import audit
from distcomp.attaching.audit_report import Audit
from distcomp.attaching.averageable import edges_of
from distcomp.attaching.bucket import Scaler
from distcomp.attaching.builtin_hooks import BuiltinHookSync
from distcomp.attaching.chosen import Chosen, chosen_method, refuse
from distcomp.attaching.ddp import GradientSync
from distcomp.attaching.exchanges import PREFIX, TensorExchanges, checked_exchanges
from distcomp.attaching.fsdp import FSDPSync
from distcomp.attaching.fsdp_gather import weight_gather_of
from distcomp.attaching.gather import to_first
from distcomp.attaching.hook_dispatcher import HookDispatcher, dispatcher_of
from distcomp.attaching.meeting_place import MeetingPlace, place_of
from distcomp.attaching.parameters import ParameterSync
from distcomp.attaching.protocol import Sync
from distcomp.attaching.requested import record_attached
from distcomp.attaching.rounds import RoundSync
from distcomp.attaching.session import Meeting, Session
from distcomp.attaching.settings import details_of, examples_of, settings_of
from distcomp.attaching.target import AcrossReplicas, Target, refuse_reduced
from distcomp.attaching.watch import Sink, Watch
from distcomp.averaging.base import Averaging
from distcomp.averaging.codistill import Codistillation
from distcomp.averaging.periodic import Periodic
from distcomp.compressors.base import Compressor
from distcomp.distill.kept import summary
from distcomp.errors import DistcompError, PeerLost
from distcomp.methods import Method
from distcomp.methods.base import ByParameter
from distcomp.methods.weight_gather import WeightGather
from distcomp.runtime.saved_state import Fingerprint, described, pack_state, unpack_state
from distcomp.training import clock_of
from distcomp.transports.backends import patience_s


def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    method: Chosen | None = None,
    *,
    scaler: Scaler | None = None,
    seed: int = 0,
    timeout_s: float | None = None,
    replicas: AcrossReplicas | None = None,
    weights: WeightGather | Compressor | Method | str | None = None,
    shared: Tensor | None = None,
    join: str | None = None,
) -> Handle:
    """Let ``method`` carry the gradients of a DDP or FSDP2 model, or average models. Call it on every rank.

    Args:
        model: the DDP model or what ``fully_shard`` returned, also when ``torch.compile`` is wrapped around
            it. Methods that average models, such as ``distcomp.diloco()`` or ``distcomp.choco()``, leave
            gradients local and take a plain module, too.
        optimizer: needed by some methods; gradient methods accept its absence.
        method: how to aggregate: an object such as ``distcomp.qsgd(bits=4)`` or a string such as
            ``"qsgd:bits=4"``. ``"ddp"``, ``"torch:fp16"`` and ``"torch:powersgd"`` are PyTorch's own, for
            comparison; ``"none"`` does not communicate (a control). None takes the environment variable
            ``DISTCOMP_METHOD``.
        scaler: the run's GradScaler, if it has one: residuals are then kept in unscaled units.
        seed: of all random rounding; must be the same on every rank.
        timeout_s: how long to wait for a peer before naming it and giving up, and so how long a rank may
            compute alone; None: the timeout of the model's process group (over Gloo usually 30 minutes).
        replicas: of a sharded FSDP model: those that hold the same shard (a group, the mesh's other
            dimension, or :class:`distcomp.Replicas`), across whom gradients or models are averaged.
        weights: of an FSDP2 model: how its weights are gathered, such as ``"qsgd:bits=8"`` or
            ``"difference:compressor=(qsgd:bits=4)"`` (:mod:`distcomp.methods.weight_gather`); None: as they
            are. Changes the weights that are computed with, never those that are trained.
        shared: unlabelled examples, the same on every rank, for ``distcomp.averaging.codistill()`` alone.
        join: ``HOST:PORT`` of the rendezvous store of others, who train by periodic averaging with
            ``on_failure="continue"``: this process, a world of its own, takes over where they are.

    Raises:
        DistcompError: what cannot be served, with the reason: a model that is not DDP, a hook of somebody
            else's, sparse gradients, an optimizer that reduces gradients itself, an unknown method.
        SettingsMismatch: ranks were attached with different settings; every rank names the difference.
        PeerLost: a rank did not attach in time.
    """
    check_arguments(model, optimizer, method, seed, timeout_s)
    target = Target.of(model, replicas)
    meeting = Meeting(target.group, patience_s(target.group) if timeout_s is None else timeout_s)
    with meeting.refusals_told():
        chosen = chosen_method(method)
        edges = _check(target, chosen, optimizer)
        examples = examples_of(target, chosen, shared)
        gathered = weight_gather_of(weights, target)
        dispatcher = dispatcher_of(target.ddp) if target.ddp is not None else None
    settings = settings_of(target, chosen, optimizer, seed) | {"weights": repr(gathered)} | examples
    session = Session.open(meeting, settings, details_of(target, chosen), edges)
    place = place_of(chosen, meeting, settings | {"model": details_of(target, chosen)}, join)
    sync = _open(chosen, target, session, dispatcher, optimizer, scaler, seed, gathered, shared, place)
    _ATTACHED.add(target.key)
    record_attached(session.recorder, session.rank, model, method, chosen, seed)
    return Handle(target, sync, dispatcher, session, seed)


_ATTACHED: WeakSet[nn.Module] = WeakSet()


def _check(target: Target, chosen: Chosen, optimizer: Optimizer | None) -> frozenset[tuple[int, int]]:
    """Raise DistcompError for what cannot be served. The edges that need connections of their own."""
    if target.key in _ATTACHED:
        raise DistcompError("a method is attached to this model already; detach it first: handle.detach()")
    refuse_reduced(target)
    refuse(target, chosen, optimizer)
    check_optimizer(target.module, optimizer)
    warn_of_rounding(target, chosen)
    masks.check_masks(chosen, target)
    return edges_of(chosen, target) if isinstance(chosen, Averaging) else frozenset()


def _open(
    chosen: Chosen,
    target: Target,
    session: Session,
    dispatcher: HookDispatcher | None,
    optimizer: Optimizer | None,
    scaler: Scaler | None,
    seed: int,
    gathered: WeightGather | None,
    shared: Tensor | None,
    place: MeetingPlace | None,
) -> Sync:
    """What serves the choice: where gradients or models meet it."""
    clock = clock_of(target.called)
    if isinstance(chosen, Method) and target.shards is not None:
        return FSDPSync(target, chosen, session, clock, seed, scaler, gathered)
    sync: BuiltinHookSync | GradientSync | ParameterSync
    if isinstance(chosen, str):
        sync = BuiltinHookSync(chosen, target.as_ddp(), session, clock)
    elif isinstance(chosen, Method):
        sync = GradientSync(target.as_ddp(), chosen, session, clock, seed, scaler)
    elif isinstance(chosen, Codistillation) and shared is not None:
        from distcomp.attaching.predictions import PredictionSync

        sync = PredictionSync(target, chosen, session, clock, optimizer, seed, shared, scaler)
    elif isinstance(chosen, Periodic) and place is not None:
        sync = RoundSync(target, chosen, session, clock, optimizer, seed, place)
    else:
        sync = ParameterSync(target, chosen, session, clock, optimizer, seed)
    if dispatcher is not None:
        dispatcher.attached = sync
    return sync


class Handle:
    """What :func:`attach` gives back. Leaving its context detaches."""

    def __init__(
        self, target: Target, sync: Sync, dispatcher: HookDispatcher | None, session: Session, seed: int
    ) -> None:
        self._target = target
        self._sync = sync
        self._dispatcher = dispatcher
        self._session = session
        self._watch = Watch(sync, session)
        for listener in (sync, self._watch):
            sync.clock.listen(listener)
        self._pruners = masks.join(target.module, sync)
        self._exchanges = TensorExchanges(sync, next(target.module.parameters()).device, seed)
        self._fingerprint = Fingerprint(described(sync.method), sync.fingerprint(target))
        everyone, store = target.place, target.everyone.get_group_store()
        self._place = everyone if sync.replicated else target.shard_place
        self._loads = Loads(store, everyone.rank, everyone.ranks, session.name, session.timeout_s)
        self._attached = True

    def __repr__(self) -> str:
        return f"<Handle of {self.method}, rank {self._session.rank} of {self._session.size}>"

    @property
    def method(self) -> str:
        """The method, as all ranks agreed on it."""
        return self._sync.text

    def stats(self) -> dict[str, Any]:
        """Iterations, bytes sent by this rank (in all, by kind, in the last iteration), where the last one's
        time went, and ``state_bytes``: what the method keeps in memory on this rank. ``training_factor``: how
        many parameters are trained for each one that is kept, where some are dropped after training
        (:func:`distcomp.distill.summary`)."""
        self._sync.idle()
        report = self._sync.report()
        if self._pruners:
            report |= {"sparsity": {name: s for one in self._pruners for name, s in one.sparsity.items()}}
        factor = summary(self._target.module).factor
        if factor > 1:
            report |= {"training_factor": factor}
        return {"method": self.method, "iterations": self._sync.iterations, **self._watch.totals(), **report}

    def log(self, **fields: Any) -> None:
        """Write one line of metrics to the run's record, if there is one (``DISTCOMP_RUN_DIR``).

        Where weights are pruned, their share goes with it as ``pruned``.
        """
        shares = [1 - pruner.density for pruner in self._pruners]
        self._watch.log(({"pruned": sum(shares) / len(shares)} if shares else {}) | fields)

    def saw(self, samples: float) -> None:
        """Count samples (or tokens) that this worker has learnt from, where workers may be late or lost
        (``on_failure="continue"`` of periodic averaging): in an outer step each weighs what it saw since its
        last one. Call it on every worker, once per step, or on none: then each weighs its steps.

        Raises DistcompError for a method that weighs all ranks alike.
        """
        self._sync.saw(samples)

    def watch(self, sink: Sink) -> None:
        """Call ``sink(record)`` for each step and each :meth:`log` of this rank, with the record that
        ``DISTCOMP_RUN_DIR`` would keep (:mod:`distcomp.recording`). A sink with a ``begin`` is first
        told ``begin(rank, world_size)``; one with a ``close`` is closed on :meth:`detach`.
        """
        begin = getattr(sink, "begin", None)
        if begin is not None:
            begin(self._session.rank, self._session.size)
        self._watch.sinks.append(sink)

    def state_dict(self) -> dict[str, Any]:
        """Residuals, warm starts, counters of this rank, under one key that names the rank, and of what they
        are: method, parameters, step, seed, ranks. Tensors, numbers and text only.

        Save it on *every* rank: ``torch.save`` to a file per rank, or ``torch.distributed.checkpoint`` as it
        is.
        """
        saved, exchanged = self._sync.state_dict(), self._exchanges.state_dict()
        state = {**saved["state"], **exchanged.pop("state")}
        return pack_state(self._place, self._fingerprint, {**saved, **exchanged, "state": state})

    def load_state_dict(self, saved: Saved, strict: bool = True) -> None:
        """Continue where a checkpoint stopped, bit for bit. Call it on every rank: all take over, or none.

        On another world size pass a list of all old ranks' state dicts: the mean of the residuals is kept.
        Without ``strict``, a state of another method, of other settings or of other parameters is taken as
        far as it fits by name, shape and dtype; what does not fit, or is not finite, begins anew.

        Raises, on every rank the same sentence and before anything is changed:
            DistcompError: a rank's part is damaged or missing, or (with ``strict``) of another method, of
                other parameters, or not finite.
            Mismatch: ranks load parts of different steps, seeds or methods.
            PeerLost: a rank did not load within the timeout.
        """
        self.load_from(lambda: saved, strict)

    def load_from(self, read: Callable[[], Saved], strict: bool = True) -> None:
        """As :meth:`load_state_dict`, of what ``read`` returns on this rank: where it raises a DistcompError
        on one rank, no rank takes anything over, and all raise it."""
        self._sync.idle()

        def leaves(part: dict[str, Any]) -> ByParameter | None:
            exchanged = {name: each for name, each in part["state"].items() if name.startswith(PREFIX)}
            own = {name: each for name, each in part["state"].items() if name not in exchanged}
            expected = self._sync.expected_state({**part, "state": own})
            return None if expected is None else {**expected, **exchanged}

        def checked() -> dict[str, Any]:
            fields = unpack_state(read(), self._place, self._fingerprint, leaves, strict)
            return {**fields, "exchanges": checked_exchanges(fields.get("exchanges", {}))}

        try:
            fields = self._loads.agreed(checked)
        except PeerLost as error:
            self._sync.error = error
            self._session.leave_note(str(error))
            raise
        own = {name: leaves for name, leaves in fields["state"].items() if not name.startswith(PREFIX)}
        self._sync.load_state_dict({**fields, "state": own})
        self._exchanges.load_state_dict(fields["exchanges"], fields["state"])

    def gather_state_dicts(self) -> dict[str, Any]:
        """All ranks' :meth:`state_dict` in one, on rank 0, and an empty one elsewhere: for savers that write
        on rank 0 alone. Call it on every rank; :meth:`load_state_dict` takes it on any of them.
        """
        parts = to_first(self.state_dict(), self._target.everyone)
        return {rank: part for one in parts for rank, part in one.items()}

    def load_checkpoint(self, path: str | Path, key: str = "distcomp", strict: bool = True) -> None:
        """As :meth:`load_state_dict`, from what ``torch.distributed.checkpoint`` saved under ``key``::

            dcp.save({"distcomp": handle.state_dict()}, checkpoint_id=path)

        Reads all ranks' parts, so that the world size may have changed.
        """
        from distcomp.attaching import checkpoint  # torch.distributed.checkpoint takes seconds to import

        self.load_from(lambda: checkpoint.read(path, key), strict)

    def exchange(self, tensor: Tensor, method: Method | str = "identity", name: str | None = None) -> Tensor:
        """The estimate of the mean of any tensor over the ranks, agreed on by any gradient method.

        ::

            logits = handle.exchange(logits, "qsgd:bits=8")           # nothing is remembered
            usage = handle.exchange(usage, "topk", name="usage")      # what was not sent is owed

        Call it on every rank alike, before a forward, between forward and backward, or after a backward. It
        goes in order with everything else on the attached line and waits for its answer; ``stats()`` counts
        its bytes by kind. Under the law of contributions the estimates of named exchanges sum to what was
        put in; unnamed ones keep no residual.

        Args:
            tensor: any shape, floating-point, on a device of the model's kind; not changed. float64 is
                rounded to float32 on the way.
            method: an object (``distcomp.qsgd(bits=8)``) or its text. Matrix methods see the tensor's shape.
            name: of a state that lives as long as the handle and is saved with ``state_dict()``: residuals,
                warm starts. The same name always with the same method and shape.

        Returns:
            A new tensor like ``tensor``, equal on every rank, without a gradient. Where a rank's tensor held
            a NaN or an infinity, all of it is NaN and the state stays as it was.

        Bytes: those of the method for one tensor, and ``n-1`` payloads of 8 bytes to agree on what is
        exchanged.

        Raises:
            DistcompError: inside a forward or a backward; a tensor that is not dense floating-point; a
                method that averages models; for PyTorch's own hooks, which have no line of ours.
            Mismatch: on every rank, where ranks ask for different shapes, types, methods or names.
            PeerLost: a rank did not call it within the timeout.
        """
        return self._exchanges.exchange(tensor, method, name)

    def audit(self) -> AbstractContextManager[Audit]:
        """What training steps send until the context ends (:func:`distcomp.attaching.audit.audit`)."""
        return audit()

    @contextmanager
    def averaged_model(self) -> Iterator[float]:
        """The model holds the mean of all ranks' weights and buffers, to be evaluated or saved; afterwards
        its own again.

        Yields how far the workers are apart: the root mean square distance of a worker's weights from the
        mean. Enter it on every rank. Under gradient methods all replicas are alike: nothing happens, and the
        distance is 0.
        """
        with self._sync.averaged() as spread:
            yield spread

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate: a backward in this context is no iteration. With DDP it is DDP's own."""
        with (
            self._sync.no_sync(),
            self._target.ddp.no_sync() if self._target.ddp is not None else nullcontext(),
        ):
            yield

    def finish(self) -> None:
        """Where models are averaged: once more, in float32. Every rank then holds the same."""
        self._sync.finish()
        self._watch.record()

    def detach(self) -> None:
        """Leave the model: from now on it reduces gradients as plain DDP or FSDP does, bit for bit. Calls
        :meth:`finish` first."""
        self._leave(agree=True)

    def _leave(self, agree: bool) -> None:
        if not self._attached:
            return
        self._attached = False
        try:
            if agree and self._sync.error is None and self._sync.iterations:
                self.finish()
        finally:
            if self._dispatcher is not None:
                self._dispatcher.attached = None
            _ATTACHED.discard(self._target.key)
            for pruner in self._pruners:
                pruner.consensus = None
            with ExitStack() as closing:  # each of them, also where one raises; the last first
                closing.callback(self._session.close, agree and self._sync.error is None)
                closing.callback(self._sync.close)
                closing.callback(self._watch.close)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._attached and self._sync.error is None:
            self._session.leave_note(f"{type(error).__name__}: {error}".splitlines()[0])
        self._leave(agree=kind is None)


Saved = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""One rank's part of a checkpoint, all ranks' in one, or a list of them."""
