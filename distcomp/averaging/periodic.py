"""Models, rarely: every H steps send what was learnt since the last time, through any method.

Periodic averaging is one class. What the papers call local SGD, sparse parameter averaging, PQASGD, DiLoCo
and their quantized or sparse relatives are its settings (:mod:`distcomp.averaging.recipes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.outer import Outer
from distcomp.collectives import Group, Rounds
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.layout import FlatBuffer, Layout, ParamSlice
from distcomp.methods.base import (
    AggregateResult,
    Method,
    PerParameter,
    State,
    StepContext,
    cut_state,
    map_state,
)
from distcomp.methods.feedback import RESIDUAL
from distcomp.methods.from_compressor import from_compressor
from distcomp.schedule import extremes

POLICIES = ("keep", "reset", "average")
"""What becomes of the optimizer's state at an exchange."""
FRAGMENT_ALIGNMENT = 512
"""Fragments made of blocks are cut at multiples of this many elements of a parameter."""


@dataclass(frozen=True)
class Periodic(Averaging):
    """Every ``period`` steps, average what the workers have learnt and start again from there.

    ::

        Delta_i = anchor - x_i                       the sum of the local updates since the last time
        anchor  = outer(anchor, mean_i Delta_i)      the mean as ``method`` estimates it
        x_i     = anchor                             on every rank, bit for bit

    What is sent is the *difference*: a quantized model instead looks fine at 8 bits and fails below. Local
    updates may come from any optimizer; weight decay, clipping, momentum and learning-rate changes between
    two exchanges are in them.

    ``fragments > 1``: a part of the model at a time, each every ``period`` steps: ``cut="blocks"``
    by blocks of 512 elements, ``cut="parameters"`` by whole parameters, every ``fragments``-th to the same
    one. ``overlap``: the exchange goes on during so many steps of computing, and when it is over
    ``x_i = alpha x_i + (1 - alpha) anchor``.

    ``optimizer_state``: ``keep`` it, ``reset`` it at an exchange, or ``average`` it (its tensors of the
    parameters' shapes, in float32). ``buffers``: floating-point buffers (BatchNorm) are ``average``-d at an
    exchange, or ``keep``-t.

    ``gradients_until``: up to and including this step gradients are averaged before the optimizer sees them,
    as DistributedDataParallel does, and models need not be; the first period begins after it.

    On the wire: ``method``'s bytes, every ``period`` steps. Memory: one model (the anchor), one for outer
    momentum, float32 ``[layout.numel]`` each, and the method's state.

    Source: McMahan et al., FedAvg, AISTATS 2017; Stich, "Local SGD converges fast", ICLR 2019; the outer
    optimizer: Douillard et al., "DiLoCo", 2023; fragments and overlap: Douillard et al., "Streaming DiLoCo",
    2025. We differ: any method may carry the difference, with or without error feedback.

    With ``on_failure="continue"`` (:class:`~distcomp.averaging.lateness.Lateness`) the mean is over those who
    come to a round, each by what it saw since its last one.

    Raises DistcompError for settings outside their ranges, for fragments or overlap with an optimizer's state
    that is reset or averaged, and for going on with an optimizer's state that is averaged or a method whose
    state no newcomer could be handed.
    """

    holds_rounds: ClassVar[bool] = True

    method: Method = field(default_factory=lambda: from_compressor(Identity()))
    outer: Outer = field(default_factory=Outer)
    fragments: int = 1
    cut: str = "blocks"
    overlap: int = 0
    alpha: float = 0.0
    optimizer_state: str = "keep"
    buffers: str = "average"
    gradients_until: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = extremes(self.period)[0]
        self._refuse(self.fragments < 1, f"there is at least 1 fragment, not {self.fragments}")
        self._refuse(self.cut not in CUTS, f"fragments are cut by {' or '.join(CUTS)}, not {self.cut!r}")
        self._refuse(
            not 0 <= self.overlap < shortest, f"the overlap is below the period, and {self.overlap} is not"
        )
        self._refuse(not 0 <= self.alpha < 1, f"alpha is in [0, 1), not {self.alpha}")
        self._refuse(
            self.optimizer_state not in POLICIES or self.buffers not in ("keep", "average"),
            "optimizer_state is 'keep', 'reset' or 'average' and buffers 'keep' or 'average', "
            f"not {self.optimizer_state!r} and {self.buffers!r}",
        )
        self._refuse(
            (self.fragments > 1 or self.overlap > 0) and self.optimizer_state != "keep",
            "fragments and overlap go with optimizer_state='keep' only: it is never averaged all at once",
        )
        if self.lateness is not None:
            self._check_rounds()

    def _check_rounds(self) -> None:
        """Whether a newcomer can be handed all that workers have in common."""
        self._refuse(
            self.optimizer_state == "average" or self.gradients_until > 0,
            "on_failure='continue' goes with an optimizer's state that is kept or reset, and without steps "
            "in which gradients are averaged; set optimizer_state=keep or reset and gradients_until=0",
        )
        self._refuse(
            self.overlap * self.fragments >= extremes(self.period)[0],
            "on_failure='continue' hands the model over between two exchanges, and with this overlap one is "
            "always under way; use an overlap below period / fragments",
        )
        own = [path for leaves in cut_state(_elements(self.method)).values() for path in leaves]
        odd = [path for path in own if path.rpartition("/")[2] != RESIDUAL]
        self._refuse(
            bool(odd),
            f"{self.method} keeps {', '.join(odd)} for every element, which a newcomer cannot be handed; use "
            "on_failure='stop', or a method that keeps residuals alone",
        )

    def _refuse(self, wrong: bool, sentence: str) -> None:
        if wrong:
            raise DistcompError(sentence)

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "anchor": FlatBuffer(x.clone(), context.layout),
            "outer": self.outer.init(context.layout),
            "method": self.method.init(context.layout),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        anchor = state["anchor"].data
        # anchor - x has a gradient's sign: an outer optimizer that descends moves to the workers' mean.
        learnt = torch.sub(anchor, x, out=memory.empty(x.numel(), x.device))
        if context.share != 1.0:
            learnt *= context.share
        result = yield from self.method.aggregate(learnt, state["method"], context)
        anchor, outer = self.outer.step(anchor, result.estimate, state["outer"])
        state = {"anchor": FlatBuffer(anchor, context.layout), "outer": outer, "method": result.state}
        return agreed(anchor, state)

    def common(self, state: State) -> State:
        """The part of a state that all workers have alike: what a newcomer is handed. Residuals are not."""
        return {**state, "method": _without_elements(state["method"])}

    def joined(self, common: State, own: State) -> State:
        """``own`` with what all have in common; residuals stay."""
        return {**common, "method": _with_elements(common["method"], own["method"])}

    def merge(self, now: Callable[[], Tensor], estimate: Tensor) -> Tensor:
        """``alpha`` of what was computed meanwhile, the rest of what was agreed."""
        return torch.lerp(estimate, now(), self.alpha) if self.alpha else estimate

    def fragments_of(self, layout: Layout) -> tuple[Layout, ...]:
        """By ``cut``; those that would be empty are left out."""
        pieces = CUTS[self.cut](layout, self.fragments) if self.fragments > 1 else (layout,)
        return tuple(piece for piece in pieces if piece.slices)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        sent = [self.method.payload_bytes(fragment, size, 0) for fragment in self.fragments_of(layout)]
        shortest, longest = extremes(self.period)
        return {"bytes_per_step": sum(sent) / longest, "bytes_per_step_at_most": sum(sent) / shortest}


def _elements(method: Method) -> State:
    """What a method keeps for every element: each worker's own."""
    state = method.init(Layout.of([("x", (2, 2))]))
    return map_state(state, lambda _, buffer: buffer, lambda _, leaf: PerParameter())


def _without_elements(state: State) -> State:
    return {
        name: _without_elements(leaf) if not isinstance(leaf, PerParameter) else leaf
        for name, leaf in state.items()
        if not isinstance(leaf, FlatBuffer)
    }


def _with_elements(common: State, own: State) -> State:
    return {
        name: leaf
        if isinstance(leaf, FlatBuffer)
        else common[name]
        if isinstance(leaf, PerParameter)
        else _with_elements(common[name], leaf)
        for name, leaf in own.items()
    }


def _blocks(layout: Layout, fragments: int) -> tuple[Layout, ...]:
    return layout.split(fragments, FRAGMENT_ALIGNMENT)


def _parameters(layout: Layout, fragments: int) -> tuple[Layout, ...]:
    """Whole parameters, dealt out in turn (the pattern with strides of the paper)."""
    return tuple(Layout(layout.slices[first::fragments]) for first in range(fragments))


CUTS = {"blocks": _blocks, "parameters": _parameters}
"""How a model is cut into fragments."""


@dataclass(frozen=True)
class Mean(Averaging):
    """Replace a share of the coordinates, drawn anew each time and alike on all ranks, by their mean.

    ::

        x_i[drawn] = mean_i x_i[drawn]

    ``share=1`` is the plain mean of the models. ``ranks_per_group > 0`` averages inside consecutive groups of
    so many ranks (the workers of one machine). There is no anchor: what is sent is the model, so a method
    that quantizes errs in proportion to the model, not to what it learnt (a control).

    Memory: none. Bytes: the method's, for ``share d`` values.

    Source: Beton et al., "SPARTA", 2025 (a share of the parameters); the plain mean: Zinkevich et al., NIPS
    2010.

    Raises DistcompError for a share outside (0, 1], a method that keeps state, and groups that do not divide
    the world.
    """

    method: Method = field(default_factory=lambda: from_compressor(Identity()))
    share: float = 1.0
    ranks_per_group: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise DistcompError(f"a share of the coordinates is above 0 and at most 1, not {self.share}")
        if cut_state(self.method.init(Layout.of([("x", (1,))]))):
            raise DistcompError(
                f"{self.method} keeps state between exchanges, and other coordinates are sent each time; "
                "use a method without error feedback"
            )

    def group(self, rank: int, size: int) -> Group | None:
        if not self.ranks_per_group:
            return None
        if size % self.ranks_per_group:
            raise DistcompError(
                f"{size} ranks make no whole number of groups of {self.ranks_per_group}; use a divisor"
            )
        first = rank - rank % self.ranks_per_group
        return tuple(range(first, first + self.ranks_per_group))

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {}

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        if self.share == 1:
            result = yield from self.method.aggregate(x, self.method.init(context.layout), context)
            return agreed(result.estimate, state)
        drawn = torch.cat(list(self._drawn(context)))
        some = Layout((ParamSlice("drawn", (drawn.numel(),), 0, drawn.numel()),))
        about = StepContext(context.rank, context.size, some, context.step, context.shared)
        result = yield from self.method.aggregate(x[drawn], self.method.init(some), about)
        model = x.clone()
        model[drawn.to(x.device)] = result.estimate
        return agreed(model, state)

    def _drawn(self, context: AveragingContext) -> Iterator[Tensor]:
        """Places in the flat buffer: ``share`` of each parameter, rounded at random: small ones have a
        turn."""
        for param, at in zip(context.layout.slices, context.layout.offsets, strict=True):
            generator = context.shared.fold(param.name, param.start).generator()
            count = int(
                self.share * param.numel + torch.rand((), generator=generator, dtype=torch.float32).item()
            )
            yield at + torch.randperm(param.numel, generator=generator)[:count]

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        return {}
