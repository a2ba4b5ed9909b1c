"""Any method, for the parameters that can have a gradient in this step and for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.active import FROZEN, ActiveParameters, ActiveSet, Frozen, Planned
from distcomp.collectives import AllGather, Rounds
from distcomp.errors import DistcompError, Mismatch
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
from distcomp.methods.feedback import owed
from distcomp.payload import Part, Parts, Payload, wire_bytes

RESIDUALS = ("keep", "drop")
"""What becomes of the residual of a coordinate that is no longer active."""

UNUSED_HERE = "unused on this rank"
"""Observed: a frozenset of the names of parameters that this rank's backward did not reach."""

DIGEST: Parts = (Part("active", torch.int64, 1),)
"""What ranks compare."""


@dataclass(frozen=True)
class ActiveOnly(Method):
    """Let ``inner`` carry the active coordinates alone.

    ::

        p_i      = x_i + h_i                     h: what is owed to inactive coordinates, if it is held
        estimate = spread(inner(pick(p_i)));     h_i = p_i where inactive, 0 elsewhere

    ``h`` is there where the source says that inactive coordinates have gradients
    (``source.keeps_dense_grad``).

    When the active set changes, what ``inner`` remembers of a coordinate stays with it: the residual of one
    that is no longer active waits until it is (``residuals="keep"``) or goes, and is added up under
    ``dropped`` (``"drop"``). Matrix state of other shapes (warm starts) begins anew. In both cases
    sum(x) = sum(contributions) + held + residuals + dropped.

    ``compare``: the ranks compare a digest of the active set at the beginning of each exchange, and name the
    rank that differs. Leave it out only where somebody else compares (a pruner does when masks change).

    ``x``: float32 ``[layout.numel]``. Bytes: those of ``inner`` for the active coordinates (nothing is sent
    where there are none), and ``(n-1) 40`` to compare.

    Source: none; masked training (Zhu & Gupta 2017), freezing and stochastic depth (Huang et al. 2016) all
    leave out gradients, and these papers do not say what becomes of residuals.

    Raises DistcompError for other ``residuals``, Mismatch where active sets differ between ranks.
    """

    inner: Method
    source: ActiveParameters
    residuals: str = "keep"
    compare: bool = True

    def __post_init__(self) -> None:
        if self.residuals not in RESIDUALS:
            raise DistcompError(f"residuals of what is inactive are 'keep' or 'drop', not {self.residuals!r}")

    def init(self, layout: Layout) -> State:
        active = self.source.active(layout, Planned())
        inner = remembered(self.inner.init(active.layout), self.inner.init(layout), active)
        state: dict[str, Any] = {"inner": inner}
        if self.source.keeps_dense_grad:
            state["held"] = FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout)
        if self.residuals == "drop":
            state["dropped"] = FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout)
        return state

    def expected_state(self, layout: Layout, saved: ByParameter) -> ByParameter:
        """Which tensors ``inner`` keeps of a parameter, and their shapes, go by what of it was active: those
        of ``saved`` that are known by name are as they should be. The next exchange takes what still fits.
        """
        expected = cut_state(self.init(layout))
        known = {path for leaves in expected.values() for path in leaves}
        return {
            name: {path: saved[name][path] for path in saved[name] if path in known}
            if name in saved
            else leaves
            for name, leaves in expected.items()
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        active = self.source.active(context.layout, context)
        if self.compare:
            yield from compared(active, context)
        held = state["held"].data if "held" in state else None
        corrected = x if held is None else x + held
        keeps = self.residuals == "keep"
        result = yield from exchange_active(self.inner, corrected, state["inner"], context, active, keeps)
        after: dict[str, Any] = {"inner": result.state}
        if held is not None:
            after["held"] = FlatBuffer(active.complement(corrected), context.layout)
        if not keeps:
            dropped = active.complement(owed(cut_state(state["inner"]), context.layout, x))
            after["dropped"] = FlatBuffer(state["dropped"].data + dropped, context.layout)
        return replace(result, state=after)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        active = self.source.active(layout, Planned(step))
        comparing = (size - 1) * wire_bytes(DIGEST) if self.compare else 0
        return comparing + (
            self.inner.payload_bytes(active.layout, size, step) if active.layout.slices else 0
        )


@dataclass(frozen=True)
class UsedOnly(Method):
    """Let ``inner`` carry the parameters that some rank used in this step; the others stay as they were.

    DistributedDataParallel with ``find_unused_parameters=True`` leaves the ``.grad`` of a parameter alone
    that no rank used, whatever was agreed on for it: what error feedback had paid out then would be lost.
    So the ranks first all-gather which parameters of the bucket they used, as bits; those that no rank used
    are not sent, and their residuals and warm starts do not change. The state is that of ``inner``.

    Bytes: ``(n-1)`` payloads of one bit for each parameter, and those of ``inner`` for what was used.
    """

    inner: Method

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.inner.propagates_nonfinite

    def init(self, layout: Layout) -> State:
        return self.inner.init(layout)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        unused = yield from unused_everywhere(context, x.device)
        context = replace(context, observed={**context.observed, FROZEN: unused})
        active = Frozen().active(context.layout, context)
        if active.indices is None:  # the usual step: nothing is copied
            return (yield from self.inner.aggregate(x, state, context))
        return (yield from exchange_active(self.inner, x, state, context, active))

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return (size - 1) * wire_bytes(_bits(layout)) + self.inner.payload_bytes(layout, size, step)


def exchange_active(
    inner: Method, x: Tensor, state: State, context: StepContext, active: ActiveSet, keeps: bool = True
) -> Rounds[AggregateResult]:
    """``inner`` about the active coordinates. ``state`` is that of the whole, and so is the new one.

    Where nothing is active nothing is sent, and nothing changes but for what is not kept.
    """
    if not active.layout.slices:
        nothing = torch.zeros_like(x)
        return AggregateResult(nothing, lambda: nothing, remembered({}, state, active, keeps))
    # What inner keeps depends on the layout that it is given: a fresh state has the shapes, the old one the
    # values where they still fit.
    fresh = _on_device(inner.init(active.layout), x.device)
    fitted = recalled(fresh, cut_state(state), active)
    result = yield from inner.aggregate(active.pick(x), fitted, replace(context, layout=active.layout))
    after = remembered(result.state, state, active, keeps)
    return AggregateResult(
        active.spread(result.estimate), lambda: active.spread(result.contribution()), after
    )


class Compared(AllGather):
    """An all-gather of digests. What is compared follows at once: in its turn it would wait until the next
    bucket is ready, and a bucket would no longer be on the wire while backward goes on."""

    @property
    def leads(self) -> bool:
        return True


def compared(active: ActiveSet, context: StepContext) -> Rounds[None]:
    """Raise Mismatch on every rank, naming those that differ from rank 0, unless all have one active set."""
    payload = Payload.empty(DIGEST)
    payload["active"].fill_(active.digest)
    payloads: list[Payload] = yield Compared(payload)
    digests = [int(each["active"]) for each in payloads]
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise Mismatch(
            f"the active parameters of rank {', '.join(map(str, odd))} differ from those of rank 0 in step "
            f"{context.step} ({active.layout.numel} of {active.whole.numel} elements are active here); a "
            "source of active parameters may depend on the step, the shared key and what all ranks observe "
            "alike"
        )


def unused_everywhere(context: StepContext, device: torch.device) -> Rounds[frozenset[str]]:
    """The parameters of the layout that no rank used, from what each rank observed."""
    here = context.observed.get(UNUSED_HERE, frozenset())
    assert isinstance(here, frozenset)
    names = context.layout.names
    payload = Payload.empty(_bits(context.layout), device)
    payload["active"].copy_(_packed([name not in here for name in names]))
    payloads: list[Payload] = yield AllGather(payload)
    used = [_unpacked(each["active"], len(names)) for each in payloads]
    return frozenset(name for at, name in enumerate(names) if not any(bits[at] for bits in used))


def _bits(layout: Layout) -> Parts:
    return (Part("active", torch.uint8, -(-len(layout.slices) // 8)),)


def _packed(bits: list[bool]) -> Tensor:
    """Eight bits a byte, the first in the lowest place."""
    number = sum(bit << at for at, bit in enumerate(bits))
    return torch.tensor(list(number.to_bytes(-(-len(bits) // 8), "little")), dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int) -> list[bool]:
    number = int.from_bytes(bytes(packed.tolist()), "little")
    return [bool(number >> at & 1) for at in range(count)]


# ---------------------------------------------------------------- what is remembered of the inactive, and how


def recalled(fresh: State, before: ByParameter, active: ActiveSet) -> State:
    """A state for the active coordinates, filled with what was remembered of them."""

    def buffer(path: str, leaf: FlatBuffer) -> FlatBuffer:
        pieces = []
        for param, new in leaf.layout.pieces(leaf.data):
            whole, elements = active.elements[param.name]
            old = before.get(param.name, {}).get(path)
            if old is None or old.numel() != whole.numel:
                pieces.append(new)
            else:
                pieces.append(old if elements is None else old[elements.to(old.device)])
        return FlatBuffer(torch.cat(pieces) if pieces else leaf.data, leaf.layout)

    def each(path: str, leaf: PerParameter) -> PerParameter:
        olds = {name: before.get(name, {}).get(path) for name in leaf}
        return PerParameter(
            {n: new if (old := olds[n]) is None or old.shape != new.shape else old for n, new in leaf.items()}
        )

    return map_state(fresh, buffer, each)


def remembered(after: State, before: State, active: ActiveSet, keeps: bool = True) -> dict[str, Any]:
    """A state of the active coordinates as one of the whole. What is inactive keeps what it had ``before``,
    or is emptied where nothing ``keeps``."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys([*after, *before]):
        new, old = after.get(name), before.get(name)
        kind = old if new is None else new
        if isinstance(kind, FlatBuffer):
            merged[name] = _merged_buffer(new, old, active, keeps)
        elif isinstance(kind, PerParameter):
            waiting = {n: value for n, value in (old or {}).items() if keeps and n not in active.elements}
            merged[name] = PerParameter(_in_order({**(new or {}), **waiting}, old or {}))
        else:
            merged[name] = remembered(new or {}, old or {}, active, keeps)
    return merged


def _merged_buffer(
    new: FlatBuffer | None, old: FlatBuffer | None, active: ActiveSet, keeps: bool
) -> FlatBuffer:
    """One number per element of the whole: the new one where active, the old one elsewhere."""
    pieces: dict[str, tuple[ParamSlice, Tensor]] = {}
    if old is not None:
        for param, piece in old.layout.pieces(old.data):
            pieces[param.name] = (param, piece if keeps else torch.zeros_like(piece))
    order = list(pieces)
    moved = {name for name in pieces if name in active.elements}
    for param, values in new.layout.pieces(new.data) if new is not None else ():
        whole, elements = active.elements[param.name]
        moved.discard(param.name)
        if elements is not None:
            _, below = pieces.get(param.name, (whole, values.new_zeros(whole.numel)))
            values = below.clone().index_copy_(0, elements.to(below.device), values)
        pieces[param.name] = (whole, values)
    for name in moved:  # another shape has led it to another leaf
        del pieces[name]
    kept = list(_in_order(pieces, order).values())
    if not kept:
        empty = new or old
        assert empty is not None
        return FlatBuffer(empty.data[:0], Layout(()))
    return FlatBuffer(torch.cat([piece for _, piece in kept]), Layout(tuple(param for param, _ in kept)))


def _on_device(state: State, device: torch.device) -> State:
    return map_state(
        state,
        lambda _, leaf: FlatBuffer(leaf.data.to(device), leaf.layout),
        lambda _, leaf: PerParameter({name: value.to(device) for name, value in leaf.items()}),
    )


def _in_order(named: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """In the order given; what that lacks comes last."""
    return {name: named[name] for name in dict.fromkeys([*order, *named]) if name in named}
