"""All-gather of weights: every rank gives its shard in few bits, and all compute with the same bits.

That is what a sharded model sends twice a step, before its forward and before its backward. The sharded
weights themselves, which the optimizer steps on, stay exact: what is rounded is a copy to compute with.

Source: Wang et al., "ZeRO++", 2023 (qwZ: quantized gathers; hpZ: a second copy kept for the backward); Jia
et al., "SDP4Bit", NeurIPS 2024 (quantized differences of weights); Markov et al., "QSDP", ICML 2023 (why 8
bits converge). We differ: any registered compressor serves; biases and norms go as they are; hpZ keeps
its copy inside a node, and here the packed payloads of all ranks are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distcomp.collectives import AllGather, Rounds
from distcomp.compressors.base import Compressor
from distcomp.compressors.topk import Sparsifier
from distcomp.errors import DistcompError
from distcomp.grammar import checked, nested, no_such, read_settings, split_call
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.reduce_scatter import owned_layout
from distcomp.methods.registry import compressor_of
from distcomp.payload import Part, Parts, Payload, body_bytes, wire_bytes
from distcomp.registry import COMPRESSORS, METHODS

KIND = "weights"
"""What the ledger counts them as."""

PLAIN = ("bias", "norm")
"""Roles of parameters that go as they are: a thousandth of the bytes, and what every other value meets."""


@dataclass(frozen=True)
class ShardCodec:
    """One shard as one payload: biases and norms as they are, in ``dtype``, the rest by ``compressor``.

    On the wire: one part, of kind ``weights``: the plain values, padded to 8 bytes, then the compressor's
    body. Plain values come back bit for bit; what is coded is decoded in float32 and rounded once, by the
    caller, to the type that is computed with.
    """

    compressor: Compressor
    dtype: torch.dtype

    def parts(self, layout: Layout) -> Parts:
        coded, _ = _split(layout)
        return (
            Part(KIND, torch.uint8, self._plain_bytes(layout) + body_bytes(self.compressor.parts(coded))),
        )

    def _plain_bytes(self, layout: Layout) -> int:
        return -(-_split(layout)[1].numel * self.dtype.itemsize // 8) * 8

    def encode(self, x: Tensor, layout: Layout, key: Any) -> Payload:
        """``x``: float32, ``[layout.numel]``, of values that ``dtype`` holds."""
        coded, plain = _split(layout)
        payload = Payload.empty(self.parts(layout), x.device)
        at = self._plain_bytes(layout)
        pieces = {param.name: piece for param, piece in layout.pieces(x)}
        payload[KIND][: plain.numel * self.dtype.itemsize].view(self.dtype).copy_(_joined(pieces, plain, x))
        payload[KIND][plain.numel * self.dtype.itemsize : at].zero_()
        payload[KIND][at:].copy_(self.compressor.encode(_joined(pieces, coded, x), coded, key).body)
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        """Write the shard (float32, ``[layout.numel]``)."""
        coded, plain = _split(layout)
        at = self._plain_bytes(layout)
        exact = payload[KIND][: plain.numel * self.dtype.itemsize].view(self.dtype)
        parts = self.compressor.parts(coded)
        # What stands where its header would be is not looked at.
        decoded = self.compressor.decode(Payload(payload.wire[at:], parts), coded)
        where = {param.name: piece for param, piece in layout.pieces(out)}
        for values, of in ((exact, plain), (decoded, coded)):
            for param, piece in of.pieces(values):
                where[param.name].copy_(piece)


def _split(layout: Layout) -> tuple[Layout, Layout]:
    """What is coded, and what goes as it is."""
    return layout.select(lambda param: param.role not in PLAIN), layout.select(
        lambda param: param.role in PLAIN
    )


def _joined(pieces: Mapping[str, Tensor], layout: Layout, x: Tensor) -> Tensor:
    chosen = [pieces[name] for name in layout.names]
    return torch.cat(chosen) if chosen else x.new_empty(0)


@dataclass(frozen=True)
class WeightGather(ABC):
    """How shards of weights are gathered. The estimate of the exchange is all shards, in rank order."""

    compressor: Compressor

    @abstractmethod
    def gather(
        self, x: Tensor, state: State, context: StepContext, dtype: torch.dtype
    ) -> Rounds[AggregateResult]:
        """Tell all ranks this rank's shard ``x`` (float32, ``[context.layout.numel]``, of values that
        ``dtype`` holds). The estimate is equal on every rank: float32, ``[n * context.layout.numel]``."""

    @property
    def keeps_frozen(self) -> bool:
        """Whether weights that are not trained are gathered once, and kept."""
        return False

    def again(self, state: State, layout: Layout, size: int, dtype: torch.dtype) -> Tensor | None:
        """What the last gather came to, where it is kept: for the backward, without a byte."""
        return None

    def saved(self, state: State, rank: int, size: int) -> Tensor | None:
        """What a rank saves of the state; None where there is nothing to save."""
        return None

    def restored(self, saved: Tensor) -> State:
        """The state to begin from, of what was saved."""
        return {}

    @abstractmethod
    def payload_bytes(self, layout: Layout, size: int, dtype: torch.dtype) -> int:
        """Bytes that one rank sends in one gather, headers included; not of a first one that goes plain."""

    @abstractmethod
    def state_bytes(self, layout: Layout, size: int, dtype: torch.dtype) -> int:
        """Bytes that one rank keeps of one flat buffer between gathers."""


@dataclass(frozen=True)
class TypedGather:
    """A gather of values that ``dtype`` holds, as the driver of exchanges carries it."""

    how: WeightGather
    dtype: torch.dtype

    propagates_nonfinite: ClassVar[bool] = False

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return self.how.gather(x, state, context, self.dtype)


@dataclass(frozen=True)
class Gather(WeightGather):
    """``w^_i = decode(encode(w_i))``, gathered: nothing is remembered from step to step (qwZ).

    Within a step the same weights are rounded alike, so that the backward sees what the forward saw. With
    ``reuse`` the payloads of all ranks are kept, packed, and the backward decodes them again (hpZ): half the
    bytes of a module that reshards after its forward, for as many bytes of memory as the whole model has on
    the wire.

    Of weights that are not trained (the base under adapters) ``keep_frozen`` keeps the payloads of all ranks
    from the first gather on: afterwards nothing of them is sent, in forward or backward.

    On the wire: ``(n-1)`` payloads; ``(n-1)/n b/8`` bytes per parameter and gather at b bits; once in all of
    frozen weights that are kept.

    Raises DistcompError for a compressor that leaves values out: their weights would be zero.
    """

    reuse: bool = False
    keep_frozen: bool = False

    @property
    def keeps_frozen(self) -> bool:
        return self.keep_frozen

    def __post_init__(self) -> None:
        if isinstance(self.compressor, Sparsifier):
            raise DistcompError(
                f"{self.compressor} leaves out most values, and weights that are not sent would be zero; use "
                f"difference:compressor=({self.compressor}), or a quantizer such as quantize:bits=8"
            )

    def gather(
        self, x: Tensor, state: State, context: StepContext, dtype: torch.dtype
    ) -> Rounds[AggregateResult]:
        codec = ShardCodec(self.compressor, dtype)
        payloads: list[Payload] = yield AllGather(codec.encode(x, context.layout, context.private))
        whole = self._decoded(payloads, codec, context.layout)
        kept = {"payloads": [payload.wire for payload in payloads]} if self.reuse else {}
        return AggregateResult(whole, lambda: whole, kept)

    def _decoded(self, payloads: list[Payload], codec: ShardCodec, layout: Layout) -> Tensor:
        whole = torch.empty(len(payloads) * layout.numel, device=payloads[0].wire.device, dtype=torch.float32)
        for payload, shard in zip(payloads, whole.chunk(len(payloads)), strict=True):
            codec.decode_into(shard, payload, layout)
        return whole

    def again(self, state: State, layout: Layout, size: int, dtype: torch.dtype) -> Tensor | None:
        if "payloads" not in state:
            return None
        codec = ShardCodec(self.compressor, dtype)
        return self._decoded(
            [Payload(wire, codec.parts(layout)) for wire in state["payloads"]], codec, layout
        )

    def payload_bytes(self, layout: Layout, size: int, dtype: torch.dtype) -> int:
        return (size - 1) * wire_bytes(ShardCodec(self.compressor, dtype).parts(layout))

    def state_bytes(self, layout: Layout, size: int, dtype: torch.dtype) -> int:
        return size * wire_bytes(ShardCodec(self.compressor, dtype).parts(layout)) if self.reuse else 0


@dataclass(frozen=True)
class Difference(WeightGather):
    """Send how far the weights have moved from what all ranks hold (SDP4Bit)::

        c_i = encode(w_i - h_i),    h_i <- h_i + decode(c_i),    all compute with h

    ``h``, kept on every rank in the type that is computed with, begins exact, by one plain gather. What was
    not sent is in the next difference, which is taken to ``h`` and not to the last weights: that is its error
    feedback. A compressor with ``E|C(x) - x|^2 <= (1 - delta) |x|^2`` brings ``h`` to weights that stand
    still at that rate, to their last bit but for the rounding of ``h``. The backward computes with the
    forward's ``h`` and sends nothing.

    On the wire: ``(n-1)/n b/8`` bytes per parameter and *step*. In memory: one value of the gather's type for
    every parameter of the whole model, on every rank.
    """

    def gather(
        self, x: Tensor, state: State, context: StepContext, dtype: torch.dtype
    ) -> Rounds[AggregateResult]:
        layout = context.layout
        if "held" not in state:
            begin: Tensor = state.get("own", x)
            held = yield from _plainly(begin, layout, dtype)
            if begin is x:
                return _holding(held, layout, context.size)
        else:
            held = state["held"].data
        codec = ShardCodec(self.compressor, dtype)
        own = held[context.rank * layout.numel :][: layout.numel].float()
        sent = codec.encode(_with_plain(x - own, x, layout), layout, context.private)
        payloads: list[Payload] = yield AllGather(sent)
        moved = torch.empty_like(own)
        after = torch.empty_like(held)
        for payload, before, into in zip(
            payloads, held.chunk(context.size), after.chunk(context.size), strict=True
        ):
            codec.decode_into(moved, payload, layout)
            into.copy_(_moved(before.float(), moved, layout))
        return _holding(after, layout, context.size)

    def again(self, state: State, layout: Layout, size: int, dtype: torch.dtype) -> Tensor | None:
        held: Tensor | None = state["held"].data.float() if "held" in state else None
        return held

    def saved(self, state: State, rank: int, size: int) -> Tensor | None:
        if "held" not in state:
            own: Tensor | None = state.get("own")
            return own
        shard: Tensor = state["held"].data.chunk(size)[rank]
        return shard.float()

    def restored(self, saved: Tensor) -> State:
        return {"own": saved}

    def payload_bytes(self, layout: Layout, size: int, dtype: torch.dtype) -> int:
        return (size - 1) * wire_bytes(ShardCodec(self.compressor, dtype).parts(layout))

    def state_bytes(self, layout: Layout, size: int, dtype: torch.dtype) -> int:
        return size * layout.numel * dtype.itemsize


def _plainly(x: Tensor, layout: Layout, dtype: torch.dtype) -> Rounds[Tensor]:
    """All shards, as they are."""
    payload = Payload.empty((Part(KIND, dtype, layout.numel),), x.device)
    payload[KIND].copy_(x)
    payloads: list[Payload] = yield AllGather(payload)
    return torch.cat([payload[KIND] for payload in payloads])


def _holding(held: Tensor, layout: Layout, size: int) -> AggregateResult:
    whole = held.float() if held.dtype != torch.float32 else held.clone()
    owned = owned_layout("/".join(layout.names), held.numel(), size)
    return AggregateResult(whole, lambda: whole, {"held": FlatBuffer(held, owned)})


def _with_plain(difference: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Biases and norms are sent as they are, not as differences."""
    for (param, piece), (_, value) in zip(layout.pieces(difference), layout.pieces(x), strict=True):
        if param.role in PLAIN:
            piece.copy_(value)
    return difference


def _moved(before: Tensor, received: Tensor, layout: Layout) -> Tensor:
    """``h + decode(c)``; of biases and norms what was received."""
    after = before + received
    return _with_plain(after, received, layout)


KINDS: Mapping[str, type[WeightGather]] = {"gather": Gather, "difference": Difference}


def parse_weight_gather(given: WeightGather | Compressor | Method | str) -> WeightGather:
    """How weights are gathered: a compressor or its text, ``qsgd:bits=8``; or
    ``gather:compressor=int8,reuse=true``, ``difference:compressor=(qsgd:bits=4)``.

    Raises DistcompError for a name that none has, settings that it does not have, or a method that is more
    than a compressor.
    """
    if isinstance(given, WeightGather):
        return given
    if not isinstance(given, str):
        return Gather(compressor_of(given))
    name, texts = split_call(given, "gather of weights")
    if name not in KINDS:
        if name not in COMPRESSORS and name not in METHODS:
            raise no_such("gather of weights", name, KINDS.keys() | COMPRESSORS.keys())
        return Gather(compressor_of(given))
    kind = KINDS[name]
    with nested():
        settings = read_settings(name, texts, kind)
        if "compressor" not in settings:
            raise DistcompError(f"{name} needs a compressor; write {name}:compressor=(quantize:bits=4)")
        settings["compressor"] = compressor_of(settings["compressor"])
    return kind(**checked(name, settings, kind))
