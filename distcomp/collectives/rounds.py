"""A method *yields* what it asks of the others and is *sent* the answers. It does no I/O.

What can be asked lies in :mod:`distcomp.collectives`, one file for each. Who carries a request
(torch.distributed, MPI, or N workers stepped in one process) is decided by a transport.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from distcomp.collectives.all_gather import AllGather
from distcomp.collectives.base import Group, Request, SharedAnswers
from distcomp.collectives.partition import merged, merged_parts, reassembled
from distcomp.payload import Payload, wire_bytes

T = TypeVar("T")


def once(answers: Sequence[Any], name: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, which every rank computes alike from the same answers: in lock-step the first of them does,
    and the others get copies."""
    if not isinstance(answers, SharedAnswers):
        return make()
    if name not in answers.made:
        answers.made[name] = make()
    return answers.made[name].clone()


Rounds = Generator[Request, Any, T]
"""An exchange: yields requests, is sent their answers, returns a T."""


def within(group: Group, aggregation: Rounds[T]) -> Rounds[T]:
    """The same exchange, held inside a group of ranks only. A source or a neighbour that it names is a
    place in the group."""
    try:
        request = next(aggregation)
        while True:
            answer = yield request.within(group)
            request = aggregation.send(answer)
    except StopIteration as stop:
        value: T = stop.value
        return value


def partitioned(request: Request, position: int, across: Group, index: int, node: Group) -> Rounds[Any]:
    """The answer to ``request`` of a node, which all of its ranks ask alike, each carrying a share of it.

    ``across``: the ranks of the group that answers, one of each node, this one at ``position``; ``node``: the
    ranks that share the work, this one at ``index``. The ``index``-th share is asked across; then the node
    puts the shares together, by one gather.
    """
    # Every rank of the node asks a share, over its own link, at the same time: the node sends each byte once.
    share = request.share(index, len(node))
    answer = yield share.within(across)
    parcels: list[Payload] = yield AllGather(merged(share.packed(answer)), group=node)
    return request.unpacked(reassembled(parcels, request.answer_parts(position, len(across))))


def partitioned_bytes(request: Request, near: int, far: int) -> float:
    """What a rank sends, on average, to have a request carried by ``near`` ranks of each of ``far`` nodes."""
    share = request.share(0, near)
    return share.mean_sent_bytes(far) + (near - 1) * wire_bytes(merged_parts(share.mean_answer_parts(far)))
