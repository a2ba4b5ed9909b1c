"""What a method is: how the ranks agree on the mean of a flat buffer, round by round.

A method is an exchange, written as a generator that does no I/O. It reads like the paper::

    def aggregate(self, x, state, context):
        p = yield from mean(x @ q, context)
        ...
        return AggregateResult(estimate, contribution, state)

**The law.** A method returns its *estimate* of the mean of ``x`` over the ranks, equal on every rank, and its
own *contribution* to it, such that *the contributions of all ranks sum to n times the estimate*. That is what
makes error feedback six lines that work for every method: keep input minus contribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distcomp.active import Observed
from distcomp.collectives import AllReduce, Rounds, all_reduce_sent_bytes
from distcomp.errors import DistcompError
from distcomp.grammar import Written
from distcomp.layout import FlatBuffer, Layout
from distcomp.randomness import Key

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

    from distcomp.compressors.base import Compressor

State = Mapping[str, Any]
"""What a method remembers: a tree of dicts whose leaves are :class:`distcomp.layout.FlatBuffer` (one number
per element, cut and joined by its layout) or :class:`PerParameter`. Returned, never mutated."""


NAMES = "the name of each parameter"
"""What :attr:`Method.needs` says of a method that treats parameters by name."""
SHAPES = "whole parameters in their shapes"
"""What it says of one that needs matrices, or convolutions."""


class PerParameter(dict[str, Tensor]):
    """A leaf of the state that holds one tensor of any shape per parameter name."""


@dataclass(frozen=True)
class StepContext:
    """The rank that aggregates, the layout of its buffer, and the step.

    ``rank`` and ``size`` are those of the group in which the exchange runs.
    """

    rank: int
    size: int
    layout: Layout
    step: int
    shared: Key
    """The same on every rank in this step."""
    error_feedback: bool = False
    """Whether the caller keeps input minus contribution for the next step, so that whatever one rank knows
    better than the others may stay with it."""
    residual: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)
    """What is to be added to ``x`` (float32, as long), for a method that ``adds_residual``."""
    out: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)
    """Memory as long as ``x``, and mostly ``x`` itself, where the estimate may lie: the caller needs neither
    what is in it nor this rank's contribution any more. Told to a method that ``may_overwrite``."""
    observed: Observed = field(default_factory=dict, kw_only=True, repr=False, compare=False)
    """What the training loop has observed by this step, equal on all ranks (:mod:`distcomp.active`)."""

    @property
    def private(self) -> Key:
        """Different on every rank."""
        return self.shared.fold("rank", self.rank)


@dataclass(frozen=True)
class AggregateResult:
    """The result of an exchange: the estimate of the mean of ``x`` (float32, ``[layout.numel]``, equal on
    every rank), this rank's contribution to it, and the new state."""

    estimate: Tensor
    contribution: Callable[[], Tensor]
    """A function, because only error feedback asks for it."""
    state: State
    subtract_contribution_: Callable[[Tensor], None] | None = None
    """Subtracts the contribution from a tensor in place: the same numbers without making the contribution
    first."""

    owed: Tensor | None = None
    """``x + context.residual`` minus the contribution, of a method that added the residual itself."""

    def residual(self, x: Tensor) -> Tensor:
        """``x`` minus the contribution. Overwrites ``x``."""
        if self.subtract_contribution_ is None:
            return x.sub_(self.contribution())
        self.subtract_contribution_(x)
        return x


class Method(Written, ABC):
    """An exchange and the state it keeps between steps. Subclasses are frozen dataclasses.

    ``str`` of one that a registered recipe made is the text that :func:`distcomp.methods.parse` reads; its
    ``repr`` says what it is made of.
    """

    propagates_nonfinite: bool = False
    """Whether a NaN or an infinity in ``x`` reaches the estimate by itself. Declared, never guessed:
    where it is not, every ``x`` is checked, and each request announces a non-finite one."""

    sums_nonfinite: bool = False
    """Whether a NaN or an infinity in ``x``, wherever it is, makes a rank's first sum non-finite: all learn
    it from that sum, and ``x`` is not looked at before. Declared, never guessed."""

    needs: frozenset[str] = frozenset()
    """What a method must know of parameters beside their values, each as a few words (:data:`NAMES`,
    :data:`SHAPES`). A caller whose buffers lack it finds it out (FSDP2), or refuses the method by these
    words."""

    adds_residual: bool = False
    """Whether it adds ``context.residual`` to ``x`` and returns what is owed then: encoders do both in the
    pass in which they encode."""

    may_overwrite: bool = False
    """Whether it can leave the estimate in ``context.out``, where the caller gives that."""

    bytes_are_bound: bool = False
    """Whether :meth:`payload_bytes` is the most that is sent, where what is sent depends on the data."""

    def init(self, layout: Layout) -> State:
        """The state before the first step, for the parameters of ``layout``."""
        return {}

    @abstractmethod
    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        """Agree on the mean of ``x`` (float32, ``[context.layout.numel]``).

        A generator: it yields what it asks of the other ranks (:mod:`distcomp.collectives`) and is sent the
        answers. All that is random comes from the keys of ``context``. Changes neither ``x`` nor ``state``.
        """

    @abstractmethod
    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """Bytes that one rank of ``size`` sends about ``layout`` in step ``step``, headers included.

        A formula, known before anything is sent.
        """

    def check(self, optimizer: Optimizer | None) -> None:
        """Raise DistcompError if this method, or one within, cannot serve the optimizer."""
        for method in self.children().values():
            method.check(optimizer)

    def assumed_state(self, layout: Layout, step: int) -> State:
        """The state that :meth:`payload_bytes` takes for granted in ``step``.

        A fresh one, unless what is sent depends on a phase that the state counts, as in GradiVeQ; a method
        around such a one asks it.
        """
        return self.init(layout)

    def expected_state(self, layout: Layout, saved: ByParameter) -> ByParameter:
        """What a checkpoint's state of these parameters, ``saved``, has to be like to be taken over.

        Shapes and dtypes count. The state before the first step, unless the state grows with what was seen.
        """
        return cut_state(self.init(layout))

    def sole_compressor(self) -> Compressor | None:
        """The compressor whose payloads are all that is sent of a matrix; None where there is none such.

        So the text of a method may stand for a compressor: gossip sends its neighbours a payload and runs no
        exchange.
        """
        return None

    def children(self) -> dict[str, Method]:
        """The methods that this one is made of, by the name of their field."""
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        return {name: getattr(self, name) for name in names if isinstance(getattr(self, name), Method)}

    def walk(self) -> Iterator[Method]:
        """This method and all that it is made of, the outer before the inner."""
        yield self
        for child in self.children().values():
            yield from child.walk()


def mean(x: Tensor, context: StepContext) -> Rounds[Tensor]:
    """The mean of ``x`` over the ranks: an all-reduce of it, ``2 (n-1)/n`` of its bytes."""
    # Times 1/n, and before the sum, as DistributedDataParallel does it: the bits are to be the same.
    total: Tensor = yield AllReduce(x * (1.0 / context.size))
    return total


def all_reduce_bytes(nbytes: float, size: int) -> int:
    """What each rank sends for the sum of a tensor of ``nbytes``.

    See :func:`distcomp.collectives.all_reduce_sent_bytes`.
    """
    return all_reduce_sent_bytes(nbytes, size)


def map_state(
    state: State, buffer: Callable[[str, FlatBuffer], object], each: Callable[[str, PerParameter], object]
) -> dict[str, Any]:
    """The tree with its leaves replaced; both functions see the leaf's path (``inner/residual``)."""

    def walk(node: State, prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, leaf in node.items():
            path = f"{prefix}{name}"
            if isinstance(leaf, PerParameter):
                out[name] = each(path, leaf)
            elif isinstance(leaf, FlatBuffer):
                out[name] = buffer(path, leaf)
            else:
                out[name] = walk(leaf, path + "/")
        return out

    return walk(state, "")


def held_bytes(state: State) -> int:
    """What a state takes in memory."""
    total = 0

    def buffer(_: str, leaf: FlatBuffer) -> None:
        nonlocal total
        total += leaf.held_bytes

    def each(_: str, leaf: PerParameter) -> None:
        nonlocal total
        total += sum(value.numel() * value.element_size() for value in leaf.values())

    map_state(state, buffer, each)
    return total


ByParameter = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> path of the leaf -> that parameter's tensor: state apart from any flat buffer."""


def cut_state(state: State) -> dict[str, dict[str, Tensor]]:
    """The state by parameter. The tensors are views: nothing is copied."""
    cut: dict[str, dict[str, Tensor]] = {}

    def buffer(path: str, leaf: FlatBuffer) -> None:
        for param, piece in leaf.layout.pieces(leaf.data):
            cut.setdefault(param.name, {})[path] = piece

    def each(path: str, leaf: PerParameter) -> None:
        for name, value in leaf.items():
            cut.setdefault(name, {})[path] = value

    map_state(state, buffer, each)
    return cut


def join_state(cut: ByParameter, template: State) -> dict[str, Any]:
    """The state of a flat buffer put together again.

    ``template``, a fresh state, gives the shape and what ``cut`` lacks. Raises DistcompError for a tensor of
    another shape: it would be read outside its memory.
    """

    def taken(name: str, path: str, fresh: Tensor) -> Tensor:
        # A new parameter has nothing saved: it begins as a fresh one would.
        value = cut.get(name, {}).get(path, fresh)
        if value.shape != fresh.shape:
            raise DistcompError(
                f"the state {path!r} of {name!r} has the shape {tuple(value.shape)} where "
                f"{tuple(fresh.shape)} is due: it is of another model or method; load this one's checkpoint"
            )
        return value.to(fresh)

    def buffer(path: str, leaf: FlatBuffer) -> FlatBuffer:
        pieces = [taken(param.name, path, fresh) for param, fresh in leaf.layout.pieces(leaf.data)]
        return FlatBuffer(torch.cat(pieces) if pieces else leaf.data, leaf.layout)

    def each(path: str, leaf: PerParameter) -> PerParameter:
        return PerParameter({name: taken(name, path, fresh) for name, fresh in leaf.items()})

    return map_state(template, buffer, each)
