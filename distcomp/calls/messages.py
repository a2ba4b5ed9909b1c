"""torch.distributed's send and recv, with a codec: between two ranks, whatever the others do meanwhile."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.calls.codec import CodecLike, codec_for
from distcomp.calls.line import Call, group_of, open_line
from distcomp.calls.tensors import begin, check_tensors, in_words, nothing, watched
from distcomp.calls.work import Work
from distcomp.collectives import AllToAll, Rounds
from distcomp.errors import DistcompError
from distcomp.methods.base import StepContext
from distcomp.payload import Parts, Payload
from distcomp.transports.types import ProcessGroup

EMPTY: Parts = ()
"""A header alone: what the receiver answers, and what a rank of two keeps for itself."""


def send(
    tensor: Tensor,
    dst: int,
    codec: CodecLike = "identity",
    *,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Work | None:
    """Send a tensor of any shape and dtype to rank ``dst`` (a global rank), which calls :func:`recv`.

    It arrives as ``decode(encode(tensor))``, in float32 inside unless the codec is ``identity``, which sends
    every dtype bit for bit; a NaN or an infinity in it makes all of it NaN by any other codec. Both ranks
    first compare what they ask. Messages of one direction arrive in the order of the calls, beside those of
    the other direction, those with other ranks, and the collectives. Waits until ``dst`` receives: two ranks
    that both send first need ``async_op=True``.

    On the wire: a payload; a digest of 8 bytes with its header, both ways; a header from the receiver. In a
    group of more than two ranks every rank calls :func:`connect` before.

    Raises DistcompError where ``dst`` is none of the group's, Mismatch on both ranks where they ask different
    things, PeerLost after the group's timeout.
    """
    pair = (_own_rank(dst, group), dst)
    check_tensors([tensor])
    codec_ = codec_for(codec, tensor.dtype)

    def asked(context: StepContext) -> Rounds[Tensor]:
        payload = codec_.encode(tensor.detach(), context.shared)
        yield AllToAll((Payload.empty(EMPTY, tensor.device), payload), (EMPTY, EMPTY))
        return torch.empty(0, dtype=torch.float32)

    call = Call(_words(tensor, codec, pair), asked, codec_.exact, pair)
    return begin(open_line(group), call, watched([tensor], codec_.exact), [], async_op)


def recv(
    tensor: Tensor,
    src: int,
    codec: CodecLike = "identity",
    *,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Work | None:
    """Receive from rank ``src`` (a global rank) what it sends by :func:`send`, into ``tensor``, in place.

    Raises as :func:`send`; ``tensor`` is then as it was.
    """
    pair = (src, _own_rank(src, group))
    check_tensors([tensor])
    codec_, shape = codec_for(codec, tensor.dtype), tuple(tensor.shape)

    def asked(context: StepContext) -> Rounds[Tensor]:
        own = Payload.empty(EMPTY, tensor.device)
        received: list[Payload] = yield AllToAll((own, own), (codec_.parts(shape), EMPTY))
        return codec_.decode(received[0], shape)

    call = Call(_words(tensor, codec, pair), asked, codec_.exact, pair)
    return begin(open_line(group), call, nothing(tensor.device), [tensor], async_op)


def _own_rank(other: int, group: ProcessGroup | None) -> int:
    """This rank's. Raises DistcompError where ``other`` is this one, or none of the group's."""
    known, own = group_of(group), dist.get_rank()
    if other not in dist.get_process_group_ranks(known):
        raise DistcompError(f"rank {other} is none of the group's; send to one that is, and receive from it")
    if other == own:
        raise DistcompError(f"rank {own} sends to itself; copy the tensor instead")
    return own


def _words(tensor: Tensor, codec: CodecLike, pair: tuple[int, int]) -> str:
    return f"a message of {in_words(tensor)} by {codec!s} from rank {pair[0]} to rank {pair[1]}"
