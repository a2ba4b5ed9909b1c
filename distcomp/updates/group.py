"""Updates over a process group: every rank of it calls, the trainer's to publish, the others to receive.

On the wire: 16 bytes of every rank to every rank (which version it has, and its fingerprint), 8 of every rank
(how long its part is), and each trainer rank's part by a broadcast, all sealed and checked as calls are
(:mod:`distcomp.calls`). A receiver that has another version than the last is found out before anything is
sent, and all are sent a key frame.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from distcomp import calls
from distcomp.errors import DistcompError
from distcomp.kernels.words import signed64
from distcomp.updates.encode import ModelOrState
from distcomp.updates.stream import Publisher, Receiver, total_fingerprint
from distcomp.updates.update import Update, merge_parts, read_update

RECEIVES, PUBLISHES = 0, 1
NO_VERSION = -1


def publish_to_group(
    publisher: Publisher, state: ModelOrState, *, key: bool = False, group: dist.ProcessGroup | None = None
) -> Update:
    """Publish the next version to all ranks of the group that call :func:`receive_from_group`; what this rank
    sent: a difference, or a key frame where one is due, asked for or needed by a receiver.

    Several ranks may publish: those over which the state is sharded, each its part.

    Raises PeerLost naming a rank that does not call, DistcompError as :func:`encode`, on all ranks where one
    that publishes refuses: nobody waits for it.
    """
    ranks = _numbers([PUBLISHES, publisher.number, signed64(publisher.fingerprint)], group)
    publishers = [rank for rank in ranks if rank[0] == PUBLISHES]
    last = total_fingerprint([rank[2] for rank in publishers])
    if len({rank[1] for rank in publishers}) > 1:
        _exchange(None, group, keep=False)  # all that publish find the same, and those that receive wait
        raise DistcompError(
            f"ranks publish after versions {sorted({rank[1] for rank in publishers})}; publish alike"
        )
    behind = any(rank[1:] != [publisher.number, signed64(last)] for rank in ranks if rank[0] == RECEIVES)
    next_is_key = publisher.key_every > 0 and (publisher.number + 1) % publisher.key_every == 0
    whole = key or behind or next_is_key
    # A key frame goes to everybody here: the difference beside it would be sent for nothing.
    try:
        (update,) = publisher.publish(state, key=whole, difference=not whole)
    except Exception:
        _exchange(None, group, keep=False)
        raise
    sizes, _ = _exchange(update, group, keep=False)
    if any(rank[0] == PUBLISHES and not size for rank, size in zip(ranks, sizes, strict=True)):
        raise DistcompError(
            f"another rank refused to publish its part of version {update.number}, and says why; once it is "
            "mended give all ranks that publish new Publishers of one number="
        )
    return update


def receive_from_group(receiver: Receiver, *, group: dist.ProcessGroup | None = None) -> int:
    """Receive the next version, and apply it; its number.

    A trainer that was started anew may count from a lower number than the receiver has: the key frame that it
    then sends is applied, too.

    Raises PeerLost naming a rank that does not call, DistcompError where nobody publishes or who should
    refuses, CorruptFile as :func:`apply`. The state is then what it was; the next call is sent a key frame.
    """
    number = NO_VERSION if receiver.number is None else receiver.number
    ranks = _numbers([RECEIVES, number, signed64(receiver.fingerprint)], group)
    _, parts = _exchange(None, group, keep=True)
    publishers = sum(rank[0] == PUBLISHES for rank in ranks)
    if not publishers:
        raise DistcompError("no rank of the group publishes; call publish_to_group on the trainer's")
    if len(parts) < publishers:
        raise DistcompError(
            "a rank that publishes refused to, and says why; nothing was changed, receive again once it is "
            "mended"
        )
    update = merge_parts([read_update(part) for part in parts])
    if update.key and receiver.number is not None and update.number <= receiver.number:
        receiver.forget()  # it was found to be behind: its number is of an earlier run
    receiver.receive(update)
    return update.number


def _exchange(
    own: Update | None, group: dist.ProcessGroup | None, *, keep: bool
) -> tuple[list[int], list[memoryview]]:
    """How many bytes each rank publishes (none where it refuses, or receives), and every part's bytes where
    they are to be kept: read once all are here, for who finds them damaged must not leave the others."""
    sizes = [size for (size,) in _numbers([own.nbytes if own is not None else 0], group)]
    received: list[memoryview] = []
    for source, size in enumerate(sizes):
        if not size:
            continue
        data = torch.empty(size, dtype=torch.uint8)
        if own is not None and dist.get_rank(group) == source:
            _fill(data, own)
        calls.broadcast(data, _global(source, group), group=group)
        if keep:
            received.append(data.numpy().data)
    return sizes, received


def _fill(data: torch.Tensor, update: Update) -> None:
    view, at = data.numpy().data, 0
    for chunk in update.chunks():
        view[at : at + len(chunk)] = chunk
        at += len(chunk)


def _global(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _numbers(mine: list[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Everybody's numbers, in order of rank."""
    row = torch.tensor(mine, dtype=torch.int64)
    everyone = torch.empty(dist.get_world_size(group) * len(mine), dtype=torch.int64)
    calls.all_gather(everyone, row, group=group)
    rows: list[list[int]] = everyone.view(-1, len(mine)).tolist()
    return rows
