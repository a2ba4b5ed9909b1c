"""Payloads between the ranks of a Gloo group over TCP connections of distcomp's own.

Gloo's thread wakes for every packet or two, which costs more than the packets: at 100 Mbit/s as much CPU time
as quantizing to four bits. ``_sockets.c`` has one thread too, and the kernel wakes it for 16 kB or the rest
of a message. A message goes from the payload's memory to the kernel and from the kernel to where it is
wanted. Sums are added by that thread, too. Sums of more than 64 MB and broadcasts are left to Gloo.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import Group, Pending, is_summed_in_pieces
from distcomp.collectives.all_reduce import PIECES_MEMBERS
from distcomp.errors import DistcompError
from distcomp.transports.board import addresses, listen, reach
from distcomp.transports.gloo_p2p import GlooP2P, Then
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.types import Store

if TYPE_CHECKING:
    from distcomp.transports._sockets import Line, Mark, Mesh

MOST_RANKS = PIECES_MEMBERS
"""Beyond, each rank would hold too many connections: Gloo carries all."""
GLOO, SOCKETS = "gloo", "sockets"
CARRIER = "DISTCOMP_CARRIER"
"""The variable that chooses: ``sockets`` (default), or ``gloo`` for everything."""

_ADDED = {torch.float32: "f", torch.float64: "d", torch.int32: "i", torch.int64: "q", torch.bfloat16: "b"}
"""The types that the thread adds, and what it calls them."""
_PARTS = 2
"""In so many parts a sum is cut, at most; of each, a piece may be one element longer than another."""
_CARD_BYTES = 1024
_HELLO_BYTES = 4
_CONNECT_S = 10.0
_DONE, _LATE, _BROKEN = range(3)
_CLOSED, _OTHER_LENGTH = -1, -2
_CUT = (_CLOSED, 0, errno.ECONNRESET, errno.EPIPE)
"""Ways in which a connection ends with the process, or the wait, at its other end."""


def wanted() -> bool:
    """Whether this rank is to use sockets. Raises DistcompError where the variable says something else."""
    chosen = os.environ.get(CARRIER, SOCKETS)
    if chosen not in (GLOO, SOCKETS):
        raise DistcompError(f"{CARRIER}={chosen[:40]} is neither {SOCKETS} nor {GLOO}; correct or unset it")
    return chosen == SOCKETS


def _extension() -> Any:
    """The C extension; None where this installation could not build it."""
    try:
        return import_module("distcomp.transports._sockets")
    except ImportError:
        return None


class SocketP2P(GlooP2P):
    """As :class:`GlooP2P`, with payloads over a connection for each pair of ranks. Made by :func:`connected`.

    Between two ranks, messages arrive in the order in which both started their requests, which is the same.
    So it serves one thread at a time, and has no lanes.
    """

    def __init__(
        self, group: dist.ProcessGroup, heartbeat: Heartbeat, timeout_s: float, connections: Sequence[int]
    ) -> None:
        super().__init__(group, heartbeat, timeout_s)
        self._sockets = _extension()
        self._mesh: Mesh = self._sockets.open(tuple(connections))
        self._kept: set[Messages] = set()
        # memory may go only after the thread that writes into it
        self._ended = weakref.finalize(self, _end, self._sockets, self._mesh, self._kept)

    def close(self) -> None:
        """End the thread, and close every connection."""
        self._ended()

    def all_reduce(self, x: Tensor, group: Group | None) -> Pending:
        """In rank order on every rank: a small tensor by everyone, a larger one piece by piece, which the
        thread adds; the largest, and types that it does not add, around Gloo's ring."""
        nbytes, members = x.numel() * x.element_size(), self._members(group)
        kind = _ADDED.get(x.dtype)
        if kind is None or x.is_cuda or not is_summed_in_pieces(nbytes, len(members)):
            return super().all_reduce(x, group)
        begin_s = time.perf_counter()
        x, here = x.contiguous(), members.index(self.rank)
        others = len(members) - 1
        scratch = x.new_empty(others * (x.numel() // len(members) + _PARTS))
        marks = self._sockets.sum(
            self._mesh, members, here, kind, x.data_ptr(), x.numel(), scratch.data_ptr()
        )
        return Then(self._kept_until_through(marks, [x, scratch], [x], begin_s), lambda totals: totals[0])

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Messages:
        return self.all_to_all([wire] * len(sizes), sizes, group)

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Messages:
        """What goes to the next rank and comes from the last one first, then from one further off; one's own
        buffer is itself."""
        members = self._members(group)
        count, here = len(members), members.index(self.rank)
        others = [(here + shift) % count for shift in range(1, count)]
        received = [
            torch.empty(size if place != here else 0, dtype=torch.uint8) for place, size in enumerate(sizes)
        ]
        received[here] = wires[here]
        return self._exchange(
            [(members[place], wires[place]) for place in others],
            [(members[place], received[place]) for place in reversed(others)],
            received,
        )

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> Messages:
        received = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        sends, receives = (list(zip(neighbors, buffers, strict=True)) for buffers in (wires, received))
        return self._exchange(sends, receives, received)

    def _exchange(
        self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], received: list[Tensor]
    ) -> Messages:
        """Post receives and sends, and keep their memory until they are through."""
        begin_s = time.perf_counter()
        sends = [(peer, _sendable(wire)) for peer, wire in sends]
        marks = self._sockets.exchange(self._mesh, _lines(sends), _lines(receives))
        return self._kept_until_through(marks, [wire for _, wire in sends], received, begin_s)

    def _kept_until_through(
        self, marks: tuple[Mark, ...], sent: list[Tensor], received: list[Tensor], begin_s: float
    ) -> Messages:
        messages = Messages(self, marks, sent, received, begin_s)
        self._kept.add(messages)
        return messages

    def settle(self, messages: Messages) -> None:
        """Wait until messages are through.

        Raises PeerLost, naming the rank, when a peer dies or does not answer within the timeout. Connections
        are closed then: who waits for this rank is told at once.
        """
        try:
            found = self._sockets.wait(self._mesh, messages.marks, self._patience.total_seconds())
            if found[0] != _DONE:
                raise RuntimeError(_complaint(*found))
        except RuntimeError as error:
            lost = self._heartbeat.diagnose(error)
            self.close()
            raise lost from error
        self._kept.discard(messages)


class Messages:
    """A request whose messages are under way."""

    def __init__(
        self,
        transport: SocketP2P,
        marks: tuple[Mark, ...],
        sent: list[Tensor],
        received: list[Tensor],
        begin_s: float,
    ) -> None:
        self.marks = marks
        self.started_s, self.finished_s = begin_s, 0.0
        self._transport = transport
        self._sent, self._received = sent, received

    def wait(self) -> list[Tensor]:
        """Raises PeerLost, naming the rank, when a peer dies or does not answer within the timeout."""
        self._transport.settle(self)
        self.finished_s = time.perf_counter()
        return self._received


def _sendable(wire: Tensor) -> Tensor:
    """The bytes in one piece on the CPU; themselves where they are."""
    return wire if wire.is_cpu and wire.is_contiguous() else wire.cpu().contiguous()


def _lines(messages: list[tuple[int, Tensor]]) -> tuple[Line, ...]:
    return tuple((peer, wire.data_ptr(), wire.numel() * wire.element_size()) for peer, wire in messages)


def _end(sockets: Any, mesh: Mesh, kept: set[Messages]) -> None:
    sockets.close(mesh)
    kept.clear()


def _complaint(state: int, peer: int, why: int, told: int) -> str:
    """What became of a wait, for the message of the error."""
    if state == _LATE:
        return f"no message from or to rank {peer} in time"
    if why == _OTHER_LENGTH:
        return f"rank {peer} sent a message of {told} bytes where another length was expected"
    if why in _CUT:
        return "a connection was closed"  # by whom is said by the boards, in the same words to all
    return f"the connection with rank {peer} broke: {os.strerror(why)}"


# ------------------------------------------------------------------------------------------------- connecting


def connected(group: dist.ProcessGroup, heartbeat: Heartbeat, timeout_s: float, store: Store) -> GlooP2P:
    """The ranks of ``group`` over sockets; over Gloo alone, on all of them, where one cannot or may not.

    Raises PeerLost where a rank does not come.
    """
    gloo = GlooP2P(group, heartbeat, timeout_s)
    if not 1 < gloo.size <= MOST_RANKS:
        return gloo
    connections: dict[int, socket.socket] = {}
    with listen() as listener:
        card = {"hosts": addresses(store), "port": listener.getsockname()[1], "token": secrets.token_hex(16)}
        if _extension() is None:
            card = {
                "failure": "its installation has no C extension; install distcomp where there is a compiler"
            }
        cards = _told(gloo, card if wanted() else {})
        if not all(cards):
            return gloo
        if not any("failure" in card for card in cards):
            cards = _told(gloo, {"failure": _failure(gloo.rank, cards, listener, connections)})
    failures = [f"rank {rank}: {card['failure']}" for rank, card in enumerate(cards) if card.get("failure")]
    if failures:
        for connection in connections.values():
            connection.close()
        warnings.warn(
            f"payloads go over Gloo, which takes more CPU time: {failures[0]}; or set {CARRIER}={GLOO}",
            stacklevel=2,
        )
        return gloo
    lines = [connections[rank].detach() if rank in connections else -1 for rank in range(gloo.size)]
    return SocketP2P(group, heartbeat, timeout_s, lines)


def _failure(
    rank: int,
    cards: Sequence[dict[str, Any]],
    listener: socket.socket,
    connections: dict[int, socket.socket],
) -> str:
    """Why this rank is not connected with all others; empty where it is."""
    try:
        _connect(rank, cards, listener, connections)
    except (OSError, DistcompError) as error:
        return str(error)[:500]
    return ""


def _told(gloo: GlooP2P, card: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says: a small dictionary, as JSON."""
    wire = torch.frombuffer(bytearray(json.dumps(card).encode().ljust(_CARD_BYTES)), dtype=torch.uint8)
    everyone = gloo.all_gather(wire, [_CARD_BYTES] * gloo.size, None).wait()
    return [json.loads(bytes(one.numpy())) for one in everyone]


def _connect(
    rank: int,
    cards: Sequence[dict[str, Any]],
    listener: socket.socket,
    connections: dict[int, socket.socket],
) -> None:
    """Connect to lower ranks, and be connected to by higher ones, who show the token that they were told.

    Raises OSError or DistcompError where one cannot be reached or does not come.
    """
    for peer in range(rank):
        connections[peer] = line = reach(cards[peer])
        line.sendall(bytes.fromhex(cards[peer]["token"]) + rank.to_bytes(_HELLO_BYTES, "little"))
    token, end_s = bytes.fromhex(cards[rank]["token"]), time.monotonic() + _CONNECT_S
    while len(connections) < len(cards) - 1:
        listener.settimeout(max(0.01, end_s - time.monotonic()))
        try:
            line, _ = listener.accept()
        except TimeoutError as error:
            late = sorted(set(range(rank + 1, len(cards))) - set(connections))
            raise DistcompError(
                f"ranks {late} did not connect within {_CONNECT_S:g} s; let all TCP through between the "
                "nodes of a job"
            ) from error
        line.settimeout(max(0.01, end_s - time.monotonic()))
        with suppress(OSError):
            peer = _introduced(line, token)
            if rank < peer < len(cards) and peer not in connections:
                connections[peer] = line
                continue
        line.close()  # a stranger
    for line in connections.values():
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _introduced(line: socket.socket, token: bytes) -> int:
    """The rank at the other end; -1 where it does not know the token."""
    said = bytearray()
    while len(said) < len(token) + _HELLO_BYTES:
        chunk = line.recv(len(token) + _HELLO_BYTES - len(said))
        if not chunk:
            return -1
        said += chunk
    known = secrets.compare_digest(bytes(said[: len(token)]), token)
    return int.from_bytes(said[len(token) :], "little") if known else -1
