"""Activations and their gradients in few bits between the stages of somebody else's pipeline.

A pipeline (``torch.distributed.pipelining``) sends what a stage returns to the next one, and the gradient of
it back. Both must be tensors of one shape and dtype, and both are here: a payload, sealed, whose bytes are
viewed as float32. Nobody computes with them on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.calls.codec import Codec, CodecLike, codec_for, restored
from distcomp.errors import CorruptPayload, DistcompError
from distcomp.payload import Payload, PayloadHeader, check_header, wire_bytes, write_header
from distcomp.randomness import Key
from distcomp.runtime.channel import finite_flag

WIRE_DTYPE = torch.float32
"""What payloads are viewed as: autograd gives whole numbers no gradient."""


@dataclass
class StageEdge:
    """What crosses from one stage to the next: activations of a shape and dtype, by ``codec``, and their
    gradients back, by ``backward``.

    ``sent_bytes`` counts what this rank has sent. On the wire: the larger of the two payloads in each
    direction, for a gradient has the shape of what it is the gradient of.
    """

    shape: tuple[int, ...]
    codec: CodecLike
    backward: CodecLike | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    sent_bytes: int = 0
    _payloads: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self._codecs: tuple[Codec, Codec] = (
            codec_for(self.codec, self.dtype),
            codec_for(self.codec if self.backward is None else self.backward, self.dtype),
        )

    @property
    def wire_elements(self) -> int:
        """Of float32: what is sent in either direction."""
        return max(wire_bytes(codec.parts(self.shape)) for codec in self._codecs) // WIRE_DTYPE.itemsize

    def example(self) -> Tensor:
        """What crosses, in shape and dtype: for a ``PipelineStage``'s ``input_args`` and ``output_args``.

        Without these a pipeline tries the stages on memory that nobody has written, which no payload is.
        """
        return torch.zeros(self.wire_elements, dtype=WIRE_DTYPE, requires_grad=True)

    def packed(self, x: Tensor, backward: bool) -> Tensor:
        """``x`` as float32 ``[wire_elements]``. Raises DistcompError for another shape than the edge's."""
        if tuple(x.shape) != self.shape or x.dtype != self.dtype:
            raise DistcompError(
                f"the stage gives {tuple(x.shape)} of {x.dtype} where {self.shape} of {self.dtype} was "
                "declared; declare the shape of one microbatch"
            )
        out = x.new_zeros(self.wire_elements, dtype=WIRE_DTYPE)
        if x.is_meta:  # a pipeline that asks for shapes
            return out
        self._payloads += 1
        payload = self._codecs[backward].encode(x, Key.of("stage", self.seed, int(backward), self._payloads))
        write_header(payload, PayloadHeader(0, int(backward), 0), finite_flag(x))
        out.view(torch.uint8)[: payload.wire.numel()] = payload.wire
        self.sent_bytes += out.numel() * out.element_size()
        return out

    def unpacked(self, wire: Tensor, backward: bool) -> Tensor:
        """What :meth:`packed` was given, as the codec leaves it; NaN where that was not finite.

        Raises CorruptPayload where the bytes are not what was sent.
        """
        like = torch.empty(self.shape, dtype=self.dtype, device=wire.device)
        if wire.is_meta:
            return like
        if wire.numel() != self.wire_elements or wire.dtype != WIRE_DTYPE:
            raise CorruptPayload(
                f"{wire.numel()} elements of {wire.dtype} came from the other stage, and "
                f"{self.wire_elements} of {WIRE_DTYPE} were expected; declare the same edge on both stages"
            )
        codec = self._codecs[backward]
        parts = codec.parts(self.shape)
        payload = Payload(wire.detach().contiguous().view(torch.uint8)[: wire_bytes(parts)], parts)
        finite = check_header(payload, PayloadHeader(0, int(backward), 0))
        answer = restored(codec.decode(payload, self.shape), like)
        return answer if codec.exact else torch.where(finite, answer, torch.full_like(answer, math.nan))


class PackedStage(nn.Module):
    """A stage that is given what :class:`StageEdge` packs, and gives such; for a pipeline's ``submodule``.

    ``receives``, ``sends``: the edges to the stage before and to the next; None at the pipeline's ends. The
    rounding of the forward is passed straight through; gradients are unbiased where their codec is.

    >>> edge = StageEdge((4, 16), "qsgd:bits=4")
    >>> first = PackedStage(nn.Linear(8, 16), sends=edge)
    >>> first(torch.ones(4, 8)).numel() * 4, 4 * 16 * 4
    (80, 256)
    """

    def __init__(
        self, stage: nn.Module, *, receives: StageEdge | None = None, sends: StageEdge | None = None
    ) -> None:
        super().__init__()
        self.stage = stage
        self.receives, self.sends = receives, sends

    def forward(self, x: Tensor) -> Tensor:
        if self.receives is not None:
            x = _Unpack.apply(x, self.receives)  # type: ignore[no-untyped-call]
        y: Tensor = self.stage(x)
        return y if self.sends is None else _Pack.apply(y, self.sends)  # type: ignore[no-untyped-call]


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, edge: StageEdge) -> Tensor:
        ctx.edge = edge
        return edge.packed(x, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.edge.unpacked(gradients[0], backward=True), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Tensor, edge: StageEdge) -> Tensor:
        ctx.edge = edge
        return edge.unpacked(wire, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.edge.packed(gradients[0].contiguous(), backward=True), None
