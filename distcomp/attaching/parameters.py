"""Models in training: when they are averaged, what else is, and how a run is saved and resumed.

The clock is the *iteration* (:mod:`distcomp.training.clock`), never the optimizer's step. An iteration's
exchange happens at the next forward that builds a graph, when the optimizer has stepped (or not) on every
rank; or when somebody asks for the models: :meth:`ParameterSync.state_dict`, :meth:`ParameterSync.averaged`,
:meth:`ParameterSync.finish`.

Under DistributedDataParallel gradients stay local: the hook hands each bucket back as it is.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from distcomp.attaching.iterations import Iterations
from distcomp.attaching.observed import observer
from distcomp.attaching.optimizers import average, forget
from distcomp.attaching.protocol import Sync
from distcomp.attaching.record import Iteration
from distcomp.attaching.rejoin import Rejoining
from distcomp.attaching.session import Session
from distcomp.attaching.shards import averaged_weights
from distcomp.attaching.target import Target
from distcomp.averaging.base import (
    Averaging,
    FragmentState,
    FromFirst,
    InFlight,
    MultiLevel,
    agreed,
    fragment_states,
    known,
)
from distcomp.compressors import Identity
from distcomp.errors import DistcompError, PeerLost
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, ByParameter, State, cut_state, held_bytes, join_state
from distcomp.methods.from_compressor import from_compressor
from distcomp.private_torch import joins
from distcomp.runtime.aggregation import Aggregation, Aggregator
from distcomp.runtime.driver import context_of, start
from distcomp.runtime.executor import Executor
from distcomp.runtime.pipeline import Timeline
from distcomp.runtime.saved_state import LARGEST, damaged, whole_number
from distcomp.training import Source, TrainingClock
from distcomp.transports.types import GradBucket


class ParameterSync(Sync):
    """Averages a model's weights as ``averaging`` says, over ``channel``.

    All ranks start from rank 0's weights and buffers.
    """

    replicated = False
    source: Source = "parameters"

    def __init__(
        self,
        target: Target,
        averaging: Averaging | MultiLevel,
        session: Session,
        clock: TrainingClock,
        optimizer: Optimizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(averaging, session, clock)
        self._session = session
        self._channel = session.channel
        self._lost: set[int] = set()
        self._optimizer = optimizer
        self._seed = seed
        self._weights = averaged_weights(target)
        self._rejoining = Rejoining(session, self, self._weights)
        if target.shards is not None:
            self.source = "outputs"  # FSDP puts gradients where no hook of a parameter sees them
        self._ddp = target.ddp
        rank, size = session.rank, session.size
        self._fragments = fragment_states(averaging, self._exchanged_layout(), rank, size)
        observe = observer(averaging, self._weights.parameters)
        for fragment in self._fragments:
            fragment.observe = observe
        self._gradients_until = max(level.gradients_until for level in averaging.levels())
        beside = any(fragment.averaging.overlap for fragment in self._fragments)
        self._executor = Executor(session.channel, self._weights.device, beside)
        self._timeline = Timeline()
        self._pending = False
        self._steps = Iterations(self._weights.parameters)
        self._broadcast_buffers = target.ddp is not None and target.ddp.broadcast_buffers
        if target.ddp is not None:
            target.ddp.broadcast_buffers = False  # a global call in every forward
        self._begin_alike()
        self._counted_bytes = self._channel.ledger.total_bytes

    def _exchanged_layout(self) -> Layout:
        """Of what is exchanged: the weights."""
        return self._weights.layout

    # ----------------------------------------------------------------------------------------- the clock

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Give a bucket back to DDP as it is, or its mean while gradients are averaged."""
        buffer = bucket.buffer()
        if self.iterations < self._gradients_until:
            self._average_gradients(buffer)
        devices: list[int | str | torch.device] | None = [buffer.device] if buffer.is_cuda else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        future.set_result(buffer)
        return future

    def _average_gradients(self, buffer: Tensor) -> None:
        """Replace a bucket by its mean over the ranks, as DDP does."""
        buffer.copy_(self._mean(buffer.float(), Layout.of([("gradients", (buffer.numel(),))])))

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards in this context are no iterations: gradients accumulate."""
        return self.clock.no_sync()

    def forward_begins(self) -> None:
        if self._ddp is not None and joins(self._ddp):
            raise DistcompError(
                "models that are averaged do not join(): a rank that has no more data would exchange nothing "
                "for which others wait; give every rank as many steps, or use a gradient method"
            )
        try:
            again = self._pending and self._steps.goes_on()
        except DistcompError as error:
            self.error = error
            self._session.leave_note(str(error))
            raise
        if not again:
            self.settle()

    def backward_ended(self) -> None:
        if self._pending and self._steps.goes_on():
            return
        self._pending = True
        self.iterations += 1
        self._steps.backward_ended()

    def before_step(self, optimizer: Optimizer) -> None:
        self._steps.before_step()

    def after_step(self, optimizer: Optimizer) -> None:
        self._steps.after_step()

    def settle(self) -> None:
        """Make the exchange that the last iteration left to be made, if it did."""
        self.idle()
        if not self._pending:
            return
        self._pending = False
        begin_s = time.perf_counter()
        self._timeline = Timeline()
        try:
            for fragment in self._fragments:
                self._apply(fragment)
                self._begin(fragment)
            self._average_moments()
        except DistcompError as error:
            self.error = error
            raise
        self._warn_of_loss()
        # Since the last iteration: also what an exchange beside the steps has sent meanwhile.
        before, self._counted_bytes = self._counted_bytes, self._channel.ledger.total_bytes
        self.last = Iteration(self.iterations - 1, self._timeline, begin_s, self._counted_bytes - before)

    def _warn_of_loss(self) -> None:
        """Say once, of each rank that is lost, that training goes on without it; and of one that is back."""
        for rank in sorted(self._lost - set(self._session.lost)):
            warnings.warn(f"rank {rank} is back; training goes on with it", stacklevel=2)
            self._lost.discard(rank)
        for rank, reason in sorted(self._session.lost.items()):
            if rank not in self._lost:
                warnings.warn(f"rank {rank} {reason}; training goes on without it", stacklevel=2)
                self._lost.add(rank)

    # ----------------------------------------------------------------------------------------- exchanges

    def _begin(self, fragment: FragmentState) -> None:
        """Start the exchange that is due, and finish it unless it overlaps."""
        if self.iterations <= fragment.averaging.gradients_until:
            fragment.last = self.iterations
            if self.iterations == fragment.averaging.gradients_until:
                self._start(fragment)  # equal on all ranks, as gradients were
            return
        if not fragment.due(self.iterations):
            return
        self._rejoining.carry(fragment, lambda: self._exchange(fragment))

    def _exchange(self, fragment: FragmentState) -> None:
        aggregation = fragment.aggregate(
            self._own(fragment), self.iterations, self._seed, frozenset(self._session.lost)
        )
        model = fragment.departed()
        if model is not None:
            self._weights.write(fragment.layout, model)
        fragment.in_flight = InFlight(self.iterations + fragment.averaging.overlap, self._drive(aggregation))
        self._apply(fragment)

    def _own(self, fragment: FragmentState) -> Tensor:
        """What this worker brings to an exchange."""
        return self._weights.read(fragment.layout)

    def _apply(self, fragment: FragmentState, early: bool = False) -> None:
        """Use the result of an exchange if its step has come."""
        if fragment.in_flight is None or (fragment.in_flight.at > self.iterations and not early):
            return
        result = fragment.in_flight.result()
        model = fragment.apply_result(result, lambda: self._weights.read(fragment.layout))
        self._weights.write(fragment.layout, model)
        if not fragment.first:
            return
        if fragment.averaging.buffers == "average":
            self._weights.write_buffers(self._agreed_buffers())
        if fragment.averaging.optimizer_state == "reset":
            forget(self._optimizer, self._weights.parameters)
        elif fragment.averaging.optimizer_state == "average":
            average(self._optimizer, self._weights.parameters, self._mean)

    def _agreed_buffers(self) -> Tensor:
        return self._mean(self._weights.read_buffers(), self._weights.buffers)

    def _average_moments(self) -> None:
        """Average what is due of the optimizer's state on its own."""
        for level in self.method.levels():
            due = [name for name, every in level.moment_periods.items() if self.iterations % every == 0]
            if due:
                average(self._optimizer, self._weights.parameters, self._mean, due)

    def _drive(self, aggregation: Aggregation) -> Callable[[], AggregateResult]:
        """Carry an exchange; the function waits for its result."""
        started = start(aggregation, self._executor)
        step = self.iterations

        @cache
        def result() -> AggregateResult:
            self._check(started.finite, started.timeline, step)
            return started.result()

        return result

    def _check(self, finite: Tensor, timeline: Timeline, step: int) -> None:
        """Take an exchange's timeline in. Raises DistcompError where somebody's model was not finite."""
        self._timeline.spans += timeline.spans
        if not self._weights.everywhere(finite):
            raise DistcompError(
                f"a worker's model held a NaN or an infinity after iteration {step}: training diverged; "
                "lower the learning rate, and restart from the last checkpoint"
            )

    def _ask(self, aggregator: Aggregator, x: Tensor, layout: Layout) -> Tensor:
        """The estimate of an exchange that keeps no state."""
        context = context_of(self._channel, layout, self.iterations, self._seed)
        return self._drive(Aggregation(aggregator, x, {}, context))().estimate if x.numel() else x

    def _mean(self, x: Tensor, layout: Layout) -> Tensor:
        """The mean over the ranks that are there."""
        mean = self._ask(from_compressor(Identity()), x, layout)
        self._warn_of_loss()
        size, present = self._session.size, self._session.present
        return mean if present == size else mean * (size / present)

    def _begin_alike(self) -> None:
        """Take rank 0's weights and buffers, where any differ, and start all fragment states from them."""
        weights = self._weights
        weights.write(weights.layout, self._ask(FromFirst(), weights.read(weights.layout), weights.layout))
        weights.write_buffers(self._ask(FromFirst(), weights.read_buffers(), weights.buffers))
        self._start_fragments()

    def _start_fragments(self) -> None:
        for fragment in self._fragments:
            self._start(fragment)

    def _start(self, fragment: FragmentState) -> None:
        fragment.start(self._weights.read(fragment.layout))

    # ----------------------------------------------------------------------------- what all agree on now

    @contextmanager
    def averaged(self) -> Iterator[float]:
        """The module holds the mean of all workers' weights and buffers; afterwards each its own again.

        Yields the root mean square distance of a worker's weights from the mean.
        """
        self.settle()
        weights = self._weights
        own, own_buffers = weights.read(weights.layout), weights.read_buffers()
        mean = self._mean(own, weights.layout)
        square = self._mean((own - mean).square().sum().view(1), Layout.of([("square", (1,))]))
        weights.write(weights.layout, mean)
        weights.write_buffers(self._mean(own_buffers, weights.buffers))
        try:
            yield weights.root_mean(square)
        finally:
            weights.write(weights.layout, own)
            weights.write_buffers(own_buffers)

    def finish(self) -> None:
        """Average all weights and buffers in float32 once more; all ranks start again from the same."""
        self.settle()
        for fragment in self._fragments:
            self._apply(fragment, early=True)
        weights = self._weights
        weights.write(weights.layout, self._mean(weights.read(weights.layout), weights.layout))
        weights.write_buffers(self._mean(weights.read_buffers(), weights.buffers))
        self._start_fragments()

    def executor(self, device: torch.device) -> Executor:
        return self._executor

    def report(self) -> dict[str, Any]:
        """What the theory depends on, in numbers, and what the algorithm has counted."""
        size = self._session.size
        counts: dict[str, Any] = {}
        for fragment in self._fragments:
            counts |= fragment.averaging.report(fragment.state)
        lost = {"lost": sorted(self._session.lost)} if self._session.lost else {}
        kept = {"state_bytes": sum(held_bytes(fragment.state) for fragment in self._fragments)}
        return {"conditions": self.method.conditions(self._weights.layout, size), **kept, **lost, **counts}

    def close(self) -> None:
        """Leave the model as it is."""
        if self._ddp is not None:
            self._ddp.broadcast_buffers = self._broadcast_buffers
        super().close()
        self._executor.close()

    # --------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """This rank's weights and buffers too: between exchanges they are its own."""
        try:
            self.settle()
        except PeerLost as error:
            raise PeerLost(
                f"{error}; state_dict() first makes the exchange that the last iteration left to be made: "
                "call it on every rank, and then save where you like"
            ) from error
        fragments = {
            fragment.name: {
                "last": fragment.last,
                "exchanges": fragment.exchanges,
                "lands_at": fragment.in_flight.at if fragment.in_flight else -1,
            }
            for fragment in self._fragments
        }
        return {
            "iterations": self.iterations,
            "seed": self._seed,
            "tracks": fragments,
            "state": cut_state(self._tree()),
        }

    def expected_state(self, saved: Mapping[str, Any]) -> ByParameter:
        """On another world size what fits is taken: states of gossip count neighbours."""
        self.settle()
        flights = self._flights(saved)
        landing = {
            fragment.name: {
                "model": FlatBuffer(self._weights.read(fragment.layout), fragment.layout),
                "state": fragment.state,
            }
            for fragment in self._fragments
            if flights[fragment.name]["lands_at"] >= 0
        }
        expected = cut_state({**self._tree(), "in_flight": landing})
        if saved["world_size"] == self._session.size:
            return expected
        own: Mapping[str, Mapping[str, Tensor]] = saved["state"]
        return {
            name: {path: expected.get(name, {}).get(path, value) for path, value in leaves.items()}
            for name, leaves in {**expected, **own}.items()
        }

    def _flights(self, saved: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """What a part says of each fragment. Raises DistcompError for what cannot be."""
        flights, step = saved.get("tracks"), saved["iterations"]
        names = {fragment.name for fragment in self._fragments}
        if not isinstance(flights, Mapping) or set(flights) != names:
            raise damaged("tracks", f"it is not of the fragments {', '.join(sorted(names))}")
        for fragment in self._fragments:
            said = flights[fragment.name]
            if not isinstance(said, Mapping):
                raise damaged("tracks", f"{fragment.name} says nothing")
            whole_number("tracks", "last", said.get("last"), -LARGEST, step)
            whole_number("tracks", "exchanges", said.get("exchanges"), 0, step)
            at = whole_number("tracks", "lands_at", said.get("lands_at"), -1)
            if at != -1 and not step < at <= step + fragment.averaging.overlap:
                raise damaged("tracks", f"what is under way would land at step {at}, and this is {step}")
        return {name: dict(flights[name]) for name in names}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved. On another world size, weights, anchors and residuals are means.

        Gossip then starts anew from the mean of the models: replicas of workers that are gone mean nothing.
        """
        self.settle()
        self.iterations, self._seed = saved["iterations"], saved["seed"]
        resized = saved["world_size"] != self._session.size
        for fragment in self._fragments:
            counts = saved["tracks"][fragment.name]
            fragment.last, fragment.exchanges = counts["last"], counts["exchanges"]
            fragment.in_flight = None
            if counts["lands_at"] >= 0:
                blank = agreed(self._weights.read(fragment.layout), fragment.state)
                fragment.in_flight = InFlight(counts["lands_at"], known(blank))
        tree = join_state(saved["state"], self._tree())
        self._weights.write(self._weights.layout, tree["weights"].data)
        self._weights.write_buffers(tree["buffers"].data)
        for fragment in self._fragments:
            fragment.state = tree["tracks"][fragment.name]
            if fragment.in_flight is not None:
                arrived = tree["in_flight"][fragment.name]
                result = agreed(arrived["model"].data, arrived["state"])
                fragment.in_flight = InFlight(fragment.in_flight.at, known(result))
            if resized and fragment.averaging.starts_anew:
                self._start(fragment)
                fragment.exchanges = 0

    def _tree(self) -> State:
        """Everything that is remembered, as one state."""
        weights = self._weights
        arriving = {
            fragment: fragment.in_flight.result()
            for fragment in self._fragments
            if fragment.in_flight is not None
        }
        return {
            "weights": FlatBuffer(weights.read(weights.layout), weights.layout),
            "buffers": FlatBuffer(weights.read_buffers(), weights.buffers),
            "tracks": {fragment.name: fragment.state for fragment in self._fragments},
            "in_flight": {
                fragment.name: {"model": FlatBuffer(result.estimate, fragment.layout), "state": result.state}
                for fragment, result in arriving.items()
            },
        }
