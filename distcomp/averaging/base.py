"""Models, not gradients, are what workers agree on: rarely, with neighbours only, or both.

An :class:`Averaging` is the algorithm: settings, and an exchange that does no I/O. A :class:`FragmentState`
is one worker's side of it for one fragment of the model: when it is due, and what it remembers. It is driven
by a training loop (:class:`distcomp.attaching.parameters.ParameterSync`) or by many workers in one process
(:class:`distcomp.averaging.workers.Workers`).

Step *t* is the iteration: a backward pass that finished, counted from 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distcomp.active import NOTHING_OBSERVED, Observed
from distcomp.averaging.lateness import Lateness, lateness_of
from distcomp.collectives import Broadcast, Group, Rounds, within
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.grammar import Written
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, State, StepContext, map_state
from distcomp.payload import Payload
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.unanimous import digest_of_values, numbers_of_all
from distcomp.schedule import Varying, extremes, whole


@dataclass(frozen=True)
class AveragingContext(StepContext):
    """The context of an exchange of models. ``step`` counts exchanges from 0; ``absent``: lost ranks;
    ``share``: this worker's weight in the mean, as a multiple of the mean weight."""

    absent: frozenset[int] = frozenset()
    share: float = 1.0


@dataclass(frozen=True)
class Departure:
    """A worker that goes on with ``model`` and ``state`` while ``exchanged`` is under way."""

    exchanged: Tensor
    model: Tensor
    state: State


@dataclass(frozen=True, kw_only=True)
class Averaging(Written, ABC):
    """An algorithm by which workers agree on models.

    Subclasses are frozen dataclasses; their ``repr`` is what ranks compare. ``period`` is the number of steps
    between two exchanges, or a Schedule of it. ``on_failure`` says what a dead worker means: ``"stop"``
    raises PeerLost naming it; ``"continue"`` goes on without it (gossip, and averagings that ``hold_rounds``,
    which take settings: :class:`~distcomp.averaging.lateness.Lateness`).

    Raises DistcompError for another ``on_failure``, or a period below 1.
    """

    holds_rounds: ClassVar[bool] = False
    """Whether it can go on in rounds of those who come: all agree on a state that a newcomer is handed."""

    period: Varying = 1
    on_failure: str = "stop"

    def __post_init__(self) -> None:
        if self.lateness not in (None, Lateness()) and not self.holds_rounds:
            raise DistcompError(
                f"{type(self).__name__} holds no rounds that wait for late workers; write "
                f"on_failure='continue', not {self.on_failure!r}"
            )
        if extremes(self.period)[0] < 1:
            raise DistcompError(f"a period is at least 1 step, not {self.period}")

    @abstractmethod
    def init(self, x: Tensor, context: AveragingContext) -> State:
        """The state before the first step; ``x`` is the model, equal on all ranks, and is not kept itself."""

    @abstractmethod
    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        """Exchange ``x``, this worker's model (float32, ``[context.layout.numel]``).

        The result's estimate is its new model, which may lie in the result's state: it is copied from.
        Does not change ``x`` or ``state``.
        """

    def depart(self, x: Tensor, state: State, context: AveragingContext) -> Departure | None:
        """What a worker does with its model ``x`` on its own as an exchange begins, before anybody answers;
        None: nothing, and ``x`` is exchanged. Does not change ``x`` or ``state``."""
        return None

    @abstractmethod
    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        """The numbers on which theory depends; ``"warning"`` where a condition of the paper does not hold.

        Raises DistcompError for settings that cannot serve this model or world size.
        """

    @property
    def lateness(self) -> Lateness | None:
        """What is done about workers that are late, lost or new; None: training stops."""
        return lateness_of(self.on_failure)

    @property
    def overlap(self) -> int:
        """Steps between the start of an exchange and the moment its result is used."""
        return 0

    @property
    def optimizer_state(self) -> str:
        """What becomes of the optimizer's state at an exchange: ``keep``, ``reset`` or ``average``."""
        return "keep"

    @property
    def moment_periods(self) -> Mapping[str, int]:
        """Tensors of the optimizer's state that are averaged on their own, by their name there: every so
        many steps."""
        return {}

    @property
    def buffers(self) -> str:
        """What becomes of floating-point buffers at an exchange: ``keep`` or ``average``."""
        return "keep"

    @property
    def gradients_until(self) -> int:
        """The last step in which gradients are averaged, in the place of models. Where nobody has gradients
        (many workers in one process), models are averaged in each of these steps."""
        return 0

    def report(self, state: State) -> dict[str, Any]:
        """What the algorithm has counted."""
        return {}

    @property
    def starts_anew(self) -> bool:
        """Whether on another world size the state begins anew from the mean of the models."""
        return False

    def levels(self) -> tuple[Averaging, ...]:
        """Averagings of different periods that this one consists of: itself."""
        return (self,)

    def group(self, rank: int, size: int) -> Group | None:
        """The ranks that take part; None for all."""
        return None

    def fragments_of(self, layout: Layout) -> tuple[Layout, ...]:
        """The fragments of the model, which are averaged one after the other."""
        return (layout,)

    def merge(self, now: Callable[[], Tensor], estimate: Tensor) -> Tensor:
        """The model after an exchange, from the worker's model as it is by then (a copy, made where it is
        asked for) and what was agreed."""
        return estimate


def agreed(model: Tensor, state: State) -> AggregateResult:
    """The result of an averaging: the new model and the state. There is no residual."""
    return AggregateResult(model, lambda: model, state)


@dataclass(frozen=True)
class MultiLevel(Written):
    """Several averagings of one model, each with a period of its own: in a machine often, across rarely."""

    parts: tuple[Averaging, ...]

    def levels(self) -> tuple[Averaging, ...]:
        """The averagings, in the order in which they exchange where several are due."""
        return self.parts

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        """Each level's."""
        return {f"level {number}": part.conditions(layout, size) for number, part in enumerate(self.parts)}


@dataclass(frozen=True)
class FromFirst:
    """Everybody takes what rank 0 has.

    On the wire: a digest of 8 bytes to every other rank; where they differ, rank 0's buffer. Ranks that made
    their models from one seed, or that DistributedDataParallel made alike, send no model.
    """

    propagates_nonfinite: bool = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        digests = yield from numbers_of_all([digest_of_values(x)], x.device)
        if (digests == digests[0]).all():
            return agreed(x, state)
        identity = Identity()
        payload: Payload = yield Broadcast(identity.encode(x, context.layout, context.shared), source=0)
        return agreed(identity.decode(payload, context.layout), state)


@dataclass(eq=False)
class FragmentState:
    """One worker's side of one level of an averaging, for one fragment of the model."""

    name: str
    averaging: Averaging
    layout: Layout
    context: AveragingContext
    group: Group | None
    first: bool
    """Whether this is the level's first fragment: what goes along with an exchange goes with this one."""
    last: int
    """The step of the last exchange; before the first it is set so that fragments take turns."""
    exchanges: int = 0
    state: State = field(default_factory=dict)
    in_flight: InFlight | None = None
    departs_with: Tensor | None = None
    """The model to go on with as the exchange begins, where it is another than before."""
    observe: Callable[[], Observed] = lambda: NOTHING_OBSERVED
    """Tells what the training loop sees (:mod:`distcomp.active`)."""

    def start(self, x: Tensor) -> None:
        """Begin (anew) from a model that is equal on all ranks."""
        self.state = map_state(
            self.averaging.init(x, replace(self.context, observed=self.observe())),
            lambda _, buffer: FlatBuffer(buffer.data.to(x.device), buffer.layout),
            lambda _, leaf: leaf,
        )
        self.in_flight = None

    def due(self, step: int) -> bool:
        """Whether an exchange begins after step ``step``."""
        # One exchange at a time: a second one would begin from a model that the first is about to replace.
        period = 1 if step <= self.averaging.gradients_until else whole(self.averaging.period, step)
        return self.in_flight is None and step - self.last >= period

    def aggregate(self, x: Tensor, step: int, seed: int, absent: frozenset[int] = frozenset()) -> Aggregation:
        """Begin the exchange that is due."""
        context = self.begun(step, seed, absent)
        departure = self.averaging.depart(x, self.state, context)
        if departure is not None:
            x, self.state, self.departs_with = departure.exchanged, departure.state, departure.model
        return self.aggregation(x, context)

    def aggregation(self, x: Tensor, context: AveragingContext) -> Aggregation:
        """An exchange of ``x`` from the state as it is."""
        return Aggregation(_Within(self.averaging, self.group), x, self.state, context)

    def begun(self, step: int, seed: int, absent: frozenset[int] = frozenset()) -> AveragingContext:
        """Count the exchange that is due; its context."""
        # Of the step: a resumed run draws what the uninterrupted one would have drawn.
        shared = Key.of(seed, step).fold("averaging", self.name)
        context = AveragingContext(
            self.context.rank,
            self.context.size,
            self.layout,
            self.exchanges,
            shared,
            absent=absent,
            observed=self.observe(),
        )
        self.last = step
        self.exchanges += 1
        return context

    def departed(self) -> Tensor | None:
        """The model to go on with, told once, where the exchange that has begun left another one."""
        model, self.departs_with = self.departs_with, None
        return model

    def apply_result(self, result: AggregateResult, now: Callable[[], Tensor]) -> Tensor:
        """Take the result in; return this worker's model, to be copied from: it may lie in the state. ``now``
        reads the model as it is."""
        self.state = result.state
        self.in_flight = None
        return self.averaging.merge(now, result.estimate)


@dataclass
class InFlight:
    """An exchange under way. ``result`` waits for it; its result is used at step ``at``."""

    at: int
    result: Callable[[], AggregateResult]


def known(result: AggregateResult) -> Callable[[], AggregateResult]:
    """A result that is there already, for whoever waits for one."""
    return lambda: result


@dataclass(frozen=True)
class _Within:
    """The averaging's exchange, held inside a group where there is one."""

    averaging: Averaging
    group: Group | None
    propagates_nonfinite: bool = False

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        assert isinstance(context, AveragingContext)
        aggregation = self.averaging.aggregate(x, state, context)
        return aggregation if self.group is None else within(self.group, aggregation)


def fragment_states(
    averaging: Averaging | MultiLevel, layout: Layout, rank: int, size: int
) -> list[FragmentState]:
    """One worker's fragment states, level by level, fragment by fragment: in the same order on every rank."""
    fragments = []
    for number, level in enumerate(averaging.levels()):
        group = level.group(rank, size)
        here, many = (rank, size) if group is None else (group.index(rank), len(group))
        layouts = level.fragments_of(layout)
        period = whole(level.period, 0)
        for index, piece in enumerate(layouts):
            # Fragments take turns: their first exchanges are spread over one period.
            first = -(-period * (index + 1) // len(layouts))
            context = AveragingContext(here, many, piece, 0, Key.of(0))
            fragments.append(
                FragmentState(
                    f"{number}.{index}", level, piece, context, group, index == 0, last=first - period
                )
            )
    return fragments


def gather(views: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The flat buffer of a layout, copied from flat tensors by name, in float32."""
    # In float32, whatever the model is in: an anchor in bfloat16 would lose updates below its spacing.
    pieces = [views[param.name][param.start : param.stop] for param in layout.slices]
    return torch.cat(pieces).float() if pieces else torch.empty(0, dtype=torch.float32)


def scatter(views: Mapping[str, Tensor], layout: Layout, buffer: Tensor) -> None:
    """Copy a flat buffer back into the flat tensors."""
    for param, piece in layout.pieces(buffer):
        views[param.name][param.start : param.stop].copy_(piece)
