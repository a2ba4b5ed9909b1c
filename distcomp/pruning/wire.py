"""Stop sending what is not there: a mask that all ranks share is a summable compressor.

Only living coordinates are sent, in their order, by plain all-reduce or through any method; no index crosses
the wire.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout, ParamSlice
from distcomp.methods.base import (
    AggregateResult,
    ByParameter,
    Method,
    PerParameter,
    State,
    StepContext,
    cut_state,
    map_state,
)
from distcomp.payload import Part, Parts, Payload
from distcomp.pruning.pruner import Pruner
from distcomp.randomness import Key

RESIDUALS = ("keep", "drop")


@dataclass(frozen=True, eq=False)
class ActiveCoordinates:
    """The living coordinates of a flat buffer: where they are, and the layout of the flat buffer that they
    make."""

    layout: Layout
    places: Tensor | None
    """Indices into the whole flat buffer, rising; None where all live."""
    whole: Layout
    alive: dict[str, tuple[ParamSlice, Tensor | None]]
    """By parameter: its segment in the whole flat buffer, and which of its elements live (None: all)."""

    def pick(self, buffer: Tensor) -> Tensor:
        """The living coordinates, in order."""
        return buffer if self.places is None else buffer[self.places.to(buffer.device)]

    def spread(self, some: Tensor) -> Tensor:
        """A whole flat buffer with zeros where nothing lives."""
        if self.places is None:
            return some
        out = some.new_zeros(self.whole.numel)
        out[self.places.to(some.device)] = some
        return out

    def without(self, buffer: Tensor) -> Tensor:
        """The flat buffer with zeros where something lives: a copy."""
        if self.places is None:
            return torch.zeros_like(buffer)
        out = buffer.clone()
        out[self.places.to(buffer.device)] = 0
        return out


def active(pruner: Pruner, layout: Layout, dense: frozenset[str] = frozenset()) -> ActiveCoordinates:
    """What lives of a flat buffer; parameters in ``dense`` count as living throughout.

    A parameter of which whole rows and columns survive (filters, channels) stays a matrix, or a stack of
    kernels, of fewer rows and columns: methods for matrices work on it. Otherwise its survivors are a vector.
    """
    masks = {one.wire_name: one.mask for one in pruner.pruned.values()}
    slices, places = [], []
    known: dict[str, tuple[ParamSlice, Tensor | None]] = {}
    for param, at in zip(layout.slices, layout.offsets, strict=True):
        mask = None if param.name in dense else masks.get(param.name)
        alive = None if mask is None else mask.reshape(-1)[param.start : param.stop].cpu()
        if mask is None or alive is None or bool(alive.all()):
            slices.append(param)
            places.append(torch.arange(at, at + param.numel))
            known[param.name] = (param, None)
        else:
            found = alive.nonzero().squeeze(1)
            slices.append(_survivors(param, mask, found.numel()))
            places.append(at + found)
            known[param.name] = (param, found)
    if tuple(slices) == layout.slices:
        return ActiveCoordinates(layout, None, layout, known)
    return ActiveCoordinates(Layout(tuple(slices)), torch.cat(places), layout, known)


def _survivors(param: ParamSlice, mask: Tensor, count: int) -> ParamSlice:
    """The segment of a parameter's survivors."""
    shape: tuple[int, ...] = (count,)
    if param.whole and mask.dim() >= 2:
        rows = int(mask.flatten(1).any(1).sum())
        columns = int(mask.transpose(0, 1).flatten(1).any(1).sum())
        box = (rows, columns, *mask.shape[2:])
        shape = box if torch.Size(box).numel() == count else shape
    return ParamSlice(param.name, shape, 0, count, param.role)


@dataclass(frozen=True, eq=False)
class Support(Compressor):
    """Send the living coordinates in float32 and nothing else: ``decode(encode(x)) = x * mask``.

    Masks are the same on every rank, so payloads may be added on the wire. ``4 nnz`` bytes, no indices.
    ``x``: float32 ``[layout.numel]``. It is a projection: what is dead is not sent, and owed by whoever keeps
    residuals.
    """

    summable = True

    pruner: Pruner

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", torch.float32, active(self.pruner, layout).layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        some = active(self.pruner, layout)
        payload = Payload.empty((Part("values", torch.float32, some.layout.numel),), x.device)
        payload["values"].copy_(some.pick(x))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        decoded = active(self.pruner, layout).spread(payload["values"])
        if add:
            out.add_(decoded)
        else:
            out.copy_(decoded)


@dataclass(frozen=True)
class Masked(Method):
    """Let ``inner`` carry the living coordinates alone.

    ::

        p_i      = x_i + h_i                     h: what is owed to dead coordinates, if it is held
        estimate = spread(inner(pick(p_i)));     h_i = p_i where dead, 0 elsewhere

    In the iteration before a mask changes, a criterion that needs gradients of dead weights has them all
    exchanged, held ones included (``pruner.needs_dense``); they are in the ledger as everything else.

    When a mask changes, what ``inner`` remembers of a coordinate stays with it: the residual of one that
    is pruned waits until it lives again (``residuals="keep"``) or goes, and is added up under ``dropped``
    (``"drop"``). Matrix state of other shapes (warm starts) begins anew. In both cases
    sum(x) = sum(contributions) + held + residuals + dropped.

    Bytes: those of ``inner`` for the living coordinates.
    """

    pruner: Pruner
    inner: Method
    residuals: str = "keep"
    _known: dict[Any, ActiveCoordinates] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.residuals not in RESIDUALS:
            raise DistcompError(f"residuals of pruned weights are 'keep' or 'drop', not {self.residuals!r}")

    def support(self, layout: Layout) -> ActiveCoordinates:
        """What is sent of a flat buffer in the coming exchange."""
        pruner = self.pruner
        step = pruner.step
        dense = frozenset(
            one.wire_name for name, one in pruner.pruned.items() if pruner.needs_dense(step, name)
        )
        key = (layout, pruner.version, dense)
        if key not in self._known:
            if len(self._known) >= 64:  # masks of long ago
                self._known.clear()
            self._known[key] = active(pruner, layout, dense)
        return self._known[key]

    def init(self, layout: Layout) -> State:
        some = self.support(layout)
        state: dict[str, Any] = {"inner": remembered(self.inner.init(some.layout), {}, some)}
        if self.pruner.criterion.keeps_dense_grad:
            state["held"] = FlatBuffer(torch.zeros(layout.numel), layout)
        if self.residuals == "drop":
            state["dropped"] = FlatBuffer(torch.zeros(layout.numel), layout)
        return state

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        some = self.support(context.layout)
        held = state["held"].data if "held" in state else None
        corrected = x if held is None else x + held
        before = cut_state(state["inner"])
        fitted = recalled(self.inner.init(some.layout), before, some)
        result = yield from self.inner.aggregate(
            some.pick(corrected), fitted, replace(context, layout=some.layout)
        )
        keeps = self.residuals == "keep"
        after: dict[str, Any] = {"inner": remembered(result.state, before if keeps else {}, some)}
        if held is not None:
            after["held"] = FlatBuffer(some.without(corrected), context.layout)
        if not keeps:
            gone = state["dropped"].data + some.without(_residual(before, context.layout, x))
            after["dropped"] = FlatBuffer(gone, context.layout)
        return AggregateResult(
            some.spread(result.estimate), lambda: some.spread(result.contribution()), after
        )

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(self.support(layout).layout, size, step)


def recalled(fresh: State, before: ByParameter, some: ActiveCoordinates) -> State:
    """A state for the living coordinates, filled with what was remembered of them."""

    def buffer(path: str, leaf: FlatBuffer) -> FlatBuffer:
        pieces = []
        for param, new in leaf.layout.pieces(leaf.data):
            _, alive = some.alive[param.name]
            old = before.get(param.name, {}).get(path)
            pieces.append(new if old is None else old if alive is None else old[alive.to(old.device)])
        return FlatBuffer(torch.cat(pieces) if pieces else leaf.data, leaf.layout)

    def each(path: str, leaf: PerParameter) -> PerParameter:
        olds = {name: before.get(name, {}).get(path) for name in leaf}
        return PerParameter(
            {n: new if (old := olds[n]) is None or old.shape != new.shape else old for n, new in leaf.items()}
        )

    return map_state(fresh, buffer, each)


def remembered(state: State, before: ByParameter, some: ActiveCoordinates) -> State:
    """A state of the living coordinates as one of whole flat buffers; the dead keep what they had
    ``before``."""

    def buffer(path: str, leaf: FlatBuffer) -> FlatBuffer:
        slices, pieces = [], []
        for param, new in leaf.layout.pieces(leaf.data):
            whole, alive = some.alive[param.name]
            slices.append(whole)
            if alive is None:
                pieces.append(new)
                continue
            old = before.get(param.name, {}).get(path)
            piece = new.new_zeros(whole.numel) if old is None else old.clone()
            piece[alive.to(piece.device)] = new
            pieces.append(piece)
        return FlatBuffer(torch.cat(pieces) if pieces else leaf.data, Layout(tuple(slices)))

    return map_state(state, buffer, lambda _, leaf: leaf)


def _residual(cut: ByParameter, layout: Layout, like: Tensor) -> Tensor:
    """The sum of all residuals that a state holds, as one flat buffer."""
    out = torch.zeros_like(like)
    for param, piece in layout.pieces(out):
        for path, leaf in cut.get(param.name, {}).items():
            if path.split("/")[-1] == "residual":
                piece.add_(leaf)
    return out
