"""torch.distributed's collectives, with a codec.

Outputs are written in place. Each call first compares, on all ranks, what is asked (a digest of 8 bytes and a
header): ranks that call differently all raise Mismatch, in the same words. With ``agreed=True`` nothing is
compared: the caller knows that the ranks have told each other what they are about to do
(:func:`distcomp.calls.exchange_counts`); where they do something else all the same, a message of another
length than is expected, or none in time, is PeerLost. A codec is a text, a compressor or
a method made of one; ``identity`` sends any dtype bit for bit. With another one, floating-point tensors are
float32 inside, every rank receives the same bits, the sender of a tensor too, and a NaN or an infinity on any
rank makes the whole answer NaN on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.calls.codec import Codec, CodecLike, check_lossy, codec_for, layout_of
from distcomp.calls.line import Call, group_of, line_of
from distcomp.calls.tensors import begin, check_tensors, in_words, watched
from distcomp.calls.work import Work
from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, ReduceScatter, Rounds
from distcomp.collectives.all_reduce import in_rank_order
from distcomp.compressors import Identity
from distcomp.errors import DistcompError, Mismatch
from distcomp.grammar import split_call
from distcomp.methods import METHODS, Method, parse
from distcomp.methods.base import StepContext
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.registry import compressor_of
from distcomp.payload import Payload
from distcomp.plugins import lookup
from distcomp.runtime.unanimous import numbers_of_all
from distcomp.transports.types import ProcessGroup


def all_reduce(
    tensor: Tensor,
    method: CodecLike = "identity",
    *,
    op: str = "sum",
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Work | None:
    """``tensor <- sum_j tensor_j`` (or the mean) over the ranks, in place, by any gradient method.

    A method begins without state: what error feedback would keep for the next step is dropped (to keep it,
    see ``Handle.exchange(name=...)``). Sums are in float32, the same bits on every rank. On the wire:
    ``method.payload_bytes``.

    Raises DistcompError for what cannot be summed, Mismatch where ranks call differently, PeerLost.
    """
    check_tensors([tensor], op)
    line = line_of(group)
    chosen = _method(method, tensor.dtype)
    size = line.session.size

    def exactly(context: StepContext) -> Rounds[Tensor]:
        total: Tensor = yield AllReduce(tensor.detach().reshape(-1).clone())
        return total / size if op == "mean" else total

    def by_method(context: StepContext) -> Rounds[Tensor]:
        assert chosen is not None
        layout = layout_of((*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape))
        about = StepContext(context.rank, context.size, layout, context.step, context.shared)
        result = yield from chosen.aggregate(x, chosen.init(layout), about)
        return result.estimate if op == "mean" else result.estimate * size

    exact = chosen is None
    words = f"all_reduce of {in_words(tensor)} by {method!s}, op={op}"
    x = watched([tensor], exact)
    return begin(line, Call(words, exactly if exact else by_method, exact), x, [tensor], async_op)


def reduce_scatter(
    output: Tensor,
    inputs: Tensor | Sequence[Tensor],
    codec: CodecLike = "identity",
    *,
    op: str = "sum",
    group: ProcessGroup | None = None,
    async_op: bool = False,
    agreed: bool = False,
) -> Work | None:
    """``output <- sum_j inputs_j[own rank]`` (or the mean): each rank receives its piece of the sum.

    ``inputs``: a tensor for each rank, shaped as ``output``, or one tensor of all, end to end along dimension
    0. Added in float32, in rank order. On the wire: ``(n-1)`` payloads of a piece.

    Raises DistcompError for pieces that do not fit, Mismatch where ranks call differently, PeerLost.
    """
    line = line_of(group)
    pieces = _pieces(inputs, line.session.size, output)
    check_tensors([output, *pieces], op)
    codec_ = codec_for(codec, output.dtype)

    def asked(context: StepContext) -> Rounds[Tensor]:
        if codec_.exact:
            flat = torch.cat([piece.detach().reshape(-1) for piece in pieces])
            total: Tensor = yield ReduceScatter(flat, (output.numel(),) * len(pieces))
        else:
            received: list[Payload] = yield AllToAll(_encoded(codec_, pieces, context))
            total = in_rank_order([codec_.decode(one, tuple(output.shape)) for one in received])
        return total / context.size if op == "mean" else total

    words = f"reduce_scatter into {in_words(output)} by {codec!s}, op={op}"
    x = watched(pieces, codec_.exact)
    return begin(line, Call(words, asked, codec_.exact, agreed=agreed), x, [output], async_op)


def all_gather(
    outputs: Tensor | Sequence[Tensor],
    tensor: Tensor,
    codec: CodecLike = "identity",
    *,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    agreed: bool = False,
) -> Work | None:
    """``outputs[j] <- tensor_j``: every rank's tensor, on every rank.

    ``outputs``: a tensor for each rank, shaped as ``tensor``, or one for all, end to end along dimension 0.
    One's own is what the others receive. On the wire: ``(n-1)`` payloads.

    Raises DistcompError for outputs that do not fit, Mismatch where ranks call differently, PeerLost.
    """
    line = line_of(group)
    pieces = _pieces(outputs, line.session.size, tensor)
    check_tensors([tensor, *pieces])
    codec_ = codec_for(codec, tensor.dtype)

    def asked(context: StepContext) -> Rounds[Tensor]:
        payload = codec_.encode(tensor.detach(), context.private.fold("gather"))
        received: list[Payload] = yield AllGather(payload)
        return torch.cat([codec_.decode(one, tuple(tensor.shape)) for one in received])

    words = f"all_gather of {in_words(tensor)} by {codec!s}"
    x = watched([tensor], codec_.exact)
    return begin(line, Call(words, asked, codec_.exact, agreed=agreed), x, pieces, async_op)


def all_to_all(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codec: CodecLike = "identity",
    *,
    group: ProcessGroup | None = None,
    async_op: bool = False,
    agreed: bool = False,
) -> Work | None:
    """``outputs[j] <- inputs_j[own rank]``: send the j-th tensor to rank j. Shapes may differ, and be empty.

    One's own goes through the codec, too. On the wire: a payload to every other rank, and all sizes
    (16 bytes for each rank, to every rank), which are compared before anything is sent, unless ``agreed``.

    Raises Mismatch on every rank where one expects another size than is sent, DistcompError, PeerLost.
    """
    line = line_of(group)
    size = line.session.size
    for name, tensors in (("outputs", outputs), ("inputs", inputs)):
        if len(tensors) != size:
            raise DistcompError(
                f"all_to_all among {size} ranks was given {len(tensors)} {name}; give one for each rank, an "
                "empty one where there is nothing"
            )
    check_tensors([*outputs, *inputs])
    codec_ = codec_for(codec, inputs[0].dtype)
    sizes = [one.numel() for one in (*inputs, *outputs)]

    def asked(context: StepContext) -> Rounds[Tensor]:
        if not agreed:
            _check_sizes((yield from numbers_of_all(sizes, inputs[0].device)).tolist())
        parts = tuple(codec_.parts(tuple(output.shape)) for output in outputs)
        received: list[Payload] = yield AllToAll(_encoded(codec_, inputs, context), parts)
        pairs = zip(received, outputs, strict=True)
        return torch.cat([codec_.decode(one, tuple(output.shape)) for one, output in pairs])

    words = f"all_to_all of {inputs[0].dtype} by {codec!s}"
    x = watched(inputs, codec_.exact)
    return begin(line, Call(words, asked, codec_.exact, agreed=agreed), x, outputs, async_op)


def broadcast(
    tensor: Tensor,
    src: int,
    codec: CodecLike = "identity",
    *,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Work | None:
    """``tensor <- tensor_src``, in place; on ``src`` (a global rank) what the others receive.

    On the wire: ``(n-1)/n`` payloads on every rank (a tree).

    Raises DistcompError where ``src`` is none of the group's, Mismatch where ranks call differently,
    PeerLost.
    """
    check_tensors([tensor])
    known = group_of(group)
    if src not in dist.get_process_group_ranks(known):
        raise DistcompError(f"rank {src} is none of the group's; broadcast from one that is")
    source = dist.get_group_rank(known, src)
    codec_ = codec_for(codec, tensor.dtype)
    shape = tuple(tensor.shape)

    def asked(context: StepContext) -> Rounds[Tensor]:
        own = context.rank == source
        payload = (
            codec_.encode(tensor.detach(), context.shared)
            if own
            else Payload.empty(codec_.parts(shape), tensor.device)
        )
        received: Payload = yield Broadcast(payload, source)
        return codec_.decode(received, shape)

    words = f"broadcast of {in_words(tensor)} from rank {src} by {codec!s}"
    here = tensor if dist.get_rank(known) == source else torch.zeros_like(tensor)
    x = watched([here], codec_.exact)
    return begin(line_of(known), Call(words, asked, codec_.exact), x, [tensor], async_op)


# ------------------------------------------------------------------------------------------ what they share


def _encoded(codec: Codec, tensors: Sequence[Tensor], context: StepContext) -> tuple[Payload, ...]:
    """A payload to each rank."""
    return tuple(
        codec.encode(tensor.detach(), context.private.fold("to", place))
        for place, tensor in enumerate(tensors)
    )


def _check_sizes(rows: list[list[int]]) -> None:
    """Raise Mismatch, on every rank alike, where one expects another size than it is sent."""
    count = len(rows)
    for source, row in enumerate(rows):
        for target in range(count):
            sent, expected = row[target], rows[target][count + source]
            if sent != expected:
                raise Mismatch(
                    f"all_to_all: rank {source} sends rank {target} {sent} elements, and rank {target} "
                    f"expects {expected}; make the output as large as what is sent"
                )


def _pieces(given: Tensor | Sequence[Tensor], count: int, like: Tensor) -> list[Tensor]:
    """A tensor for each rank, each shaped as ``like``; views, where one tensor holds them all."""
    if isinstance(given, Tensor):
        if given.numel() != count * like.numel() or not given.is_contiguous():
            raise DistcompError(
                f"a tensor of {tuple(given.shape)} does not hold {count} of {tuple(like.shape)} end to end; "
                "make it contiguous, with dimension 0 as many times as long"
            )
        return list(given.detach().view(count, *like.shape).unbind(0))
    wrong = [tuple(one.shape) for one in given if one.shape != like.shape]
    if len(given) != count or wrong:
        raise DistcompError(
            f"{len(given)} tensors, {len(wrong)} of another shape than {tuple(like.shape)}, were given to "
            f"{count} ranks; give each rank one of that shape"
        )
    return list(given)


def _method(chosen: CodecLike, dtype: torch.dtype) -> Method | None:
    """How it is summed; None for the exact sum in the tensor's own dtype."""
    method = _method_named(chosen) if isinstance(chosen, str) else _method_of(chosen)
    method.check(None)
    if method == from_compressor(Identity()):
        return None
    check_lossy(method, dtype)
    return method


@functools.lru_cache(maxsize=64)
def _method_named(text: str) -> Method:
    """Read once: a loop gives the same few texts in every call, and methods have no state."""
    named = lookup(METHODS, split_call(text, "method")[0]) is not None
    return _method_of(parse(text) if named else text)


def _method_of(chosen: CodecLike) -> Method:
    return chosen if isinstance(chosen, Method) else from_compressor(compressor_of(chosen))
