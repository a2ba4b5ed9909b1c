"""Sockets between workers that come and go: a door that each keeps open, and lines between those of a round.

A process group is of those who made it. Here every worker listens on a port of its own, which the rendezvous
store names with a token: the members of a round connect with each other, and go on over the same connections
as long as they stay the same. Whoever comes later, or anew, knocks at any door. Where a worker has died, its
port answers nobody: so the dead are told from the late.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import Group, Pending, Request, in_rank_order, is_summed_directly
from distcomp.errors import DistcompError
from distcomp.transports.board import addresses, listen, reach
from distcomp.transports.bounded import ask_store
from distcomp.transports.types import Store

Epoch = tuple[int, int]
"""Which connections: the round and the attempt for which they were made."""

HELLO = struct.Struct("!32sqqq")
"""A token, who speaks, and for which epoch; a round of -1 asks for what there is to download, of the round
that stands in the attempt's place or a later one."""
DOWNLOAD = -1
LENGTH = struct.Struct("!q")
LONGEST_DOWNLOAD = 1 << 40
HELLO_S = 5.0
"""So long one who has connected may take to say who it is."""
LOOK_S = 0.5
"""So often one who waits to be called looks whether the other still can."""
PIECE = 1 << 20


class Broken(Exception):
    """A line was closed, or somebody on it did not answer in time."""


class Mesh:
    """The door of worker ``me``, and the way to others'. ``answer(least)`` makes what a download brings, of
    round ``least`` or a later one; nothing where there is none yet.

    Who does not know a door's token is not heard.
    """

    def __init__(self, store: Store, me: int, answer: Callable[[int], bytes]) -> None:
        self.me = me
        self._store = store
        self._answer = answer
        self._token = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._came: dict[tuple[int, Epoch], socket.socket] = {}
        self._closed = False
        self._listening = listen()
        door = {
            "hosts": addresses(store), "port": self._listening.getsockname()[1], "token": self._token
        }  # fmt: skip
        ask_store(lambda: store.set(_door(me), json.dumps(door)))
        self._thread = threading.Thread(target=self._listen, name="distcomp-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Shut the door: from now on nobody answers here."""
        self._closed = True
        with suppress(OSError):  # wakes the thread, which waits in accept
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        with self._changed:
            for connection in self._came.values():
                connection.close()
            self._came.clear()

    def is_gone(self, worker: int) -> bool:
        """Whether a worker has died or ended: its host says that nobody listens at its port."""
        try:
            reach(self._where(worker)).close()
        except DistcompError as error:
            return isinstance(error.__cause__, ConnectionRefusedError)
        return False

    def line(
        self, members: Sequence[int], epoch: Epoch, patience_s: float, is_over: Callable[[], bool]
    ) -> MemberLine:
        """Connect the members of a round with each other; all of them call it. ``is_over``: whether others
        have given up waiting. Raises Broken where one does not come."""
        deadline_s = time.monotonic() + patience_s
        sockets: dict[int, socket.socket] = {}
        try:
            for place, worker in enumerate(members):
                if worker < self.me:
                    sockets[place] = self._knock(worker, epoch)
            for place, worker in enumerate(members):
                if worker > self.me:
                    sockets[place] = self._wait_for(worker, epoch, deadline_s, is_over)
        except BaseException:
            for connection in sockets.values():
                connection.close()
            raise
        for connection in sockets.values():
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return MemberLine(tuple(members).index(self.me), len(members), sockets, patience_s)

    def download(self, worker: int, least: int, patience_s: float) -> bytes:
        """What a worker hands to those who come. Raises Broken where it has nothing."""
        with self._knock(worker, (DOWNLOAD, least)) as connection:
            connection.settimeout(patience_s)
            try:
                (length,) = LENGTH.unpack(_received(connection, LENGTH.size))
                if not 0 < length <= LONGEST_DOWNLOAD:
                    raise Broken(f"worker {worker} announces {length} bytes")
                return _received(connection, length)
            except OSError as error:
                raise Broken(f"worker {worker} hands nothing over ({error})") from error

    # ------------------------------------------------------------------------------------------ the door

    def _where(self, worker: int) -> Mapping[str, Any]:
        door: Mapping[str, Any] = json.loads(ask_store(lambda: self._store.get(_door(worker))))
        return door

    def _knock(self, worker: int, epoch: Epoch) -> socket.socket:
        where = self._where(worker)
        try:
            connection = reach(where)
            connection.sendall(HELLO.pack(where["token"].encode(), self.me, *epoch))
        except (DistcompError, OSError) as error:
            raise Broken(f"worker {worker} does not open ({error})") from error
        return connection

    def _wait_for(
        self, worker: int, epoch: Epoch, deadline_s: float, is_over: Callable[[], bool]
    ) -> socket.socket:
        key = (worker, epoch)
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: key in self._came, LOOK_S):
                    return self._came.pop(key)
            if time.monotonic() >= deadline_s or is_over() or self.is_gone(worker):
                raise Broken(f"worker {worker} did not connect")

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            greeting = threading.Thread(target=self._greet, args=(connection,), name="greeting", daemon=True)
            greeting.start()

    def _greet(self, connection: socket.socket) -> None:
        """Hear who has come, and what for."""
        try:
            connection.settimeout(HELLO_S)
            token, worker, *epoch = HELLO.unpack(_received(connection, HELLO.size))
            if not secrets.compare_digest(token, self._token.encode()):
                raise OSError("it does not know the token")
            connection.settimeout(None)
            if epoch[0] == DOWNLOAD:
                wire = self._answer(epoch[1])
                connection.sendall(LENGTH.pack(len(wire)))
                connection.sendall(wire)
                connection.close()
                return
        except (OSError, Broken):
            connection.close()
            return
        with self._changed:
            self._came[worker, (epoch[0], epoch[1])] = connection
            self._changed.notify_all()


class MemberLine:
    """Carries requests among the members of a round: rank i is the i-th of them.

    Every request is carried from each to each, so that everybody learns at once of one who is gone. Sums are
    added in rank order by an owner of each part, and gathered: the same bits on every rank.
    """

    def __init__(self, rank: int, size: int, sockets: dict[int, socket.socket], patience_s: float) -> None:
        self.rank, self.size = rank, size
        self._sockets = sockets
        self._patience_s = patience_s

    def start(self, request: Request) -> Pending:
        return request.drive(self)

    def close(self) -> None:
        """Let go of the connections: the others are told."""
        for connection in self._sockets.values():
            connection.close()

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Carried:
        places = group or tuple(range(self.size))

        def carry() -> list[Tensor]:
            return self._swap(dict(zip(places, wires, strict=True)), dict(zip(places, sizes, strict=True)))

        return Carried(carry)

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Carried:
        return self.all_to_all([wire] * len(sizes), sizes, group)

    def all_reduce(self, x: Tensor, group: Group | None) -> Carried:
        places = group or tuple(range(self.size))
        flat = x.reshape(-1)
        if is_summed_directly(x.numel() * x.element_size(), len(places)):
            return Carried(lambda: self._summed([flat] * len(places), places).view_as(x))
        width = -(-flat.numel() // len(places))
        parts = [flat[at * width : (at + 1) * width] for at in range(len(places))]

        def carry() -> Tensor:
            mine = self._summed(parts, places).view(torch.uint8)
            sizes = {place: _bytes(part) for place, part in zip(places, parts, strict=True)}
            gathered = self._swap(dict.fromkeys(places, mine), sizes)
            return torch.cat([wire.view(x.dtype) for wire in gathered]).view_as(x)

        return Carried(carry)

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> Carried:
        places = group or tuple(range(self.size))
        nothing = torch.empty(0, dtype=torch.uint8)

        def carry() -> list[Tensor]:
            own = self.rank == source
            received = self._swap(
                dict.fromkeys(places, wire if own else nothing),
                {place: wire.numel() if place == source else 0 for place in places},
            )
            return [received[places.index(source)]]

        return Carried(carry)

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> Carried:
        raise DistcompError("a round has no neighbours; use gossip, which has lines of its own")

    def _summed(self, parts: Sequence[Tensor], places: Group) -> Tensor:
        """The sum of everybody's part that is this rank's."""
        own = parts[places.index(self.rank)]
        wires = {place: part.view(torch.uint8) for place, part in zip(places, parts, strict=True)}
        return in_rank_order(
            [wire.view(own.dtype) for wire in self._swap(wires, dict.fromkeys(places, _bytes(own)))]
        )

    def _swap(self, outgoing: dict[int, Tensor], sizes: dict[int, int]) -> list[Tensor]:
        """Send each place its bytes and receive as many as ``sizes`` says; one's own come as they are.

        Raises Broken where a connection ends, or nothing moves for ``patience_s``.
        """
        received = {place: torch.empty(size, dtype=torch.uint8) for place, size in sizes.items()}
        out = {place: memoryview(wire.contiguous().numpy()) for place, wire in outgoing.items()}  # type: ignore[arg-type]
        into = {place: memoryview(buffer.numpy()) for place, buffer in received.items()}  # type: ignore[arg-type]
        received[self.rank] = outgoing[self.rank]
        with selectors.DefaultSelector() as selector:
            for place in sizes:
                if place != self.rank:
                    _register(selector, self._sockets[place], place, len(out[place]), len(into[place]))
            while selector.get_map():
                ready = selector.select(self._patience_s)
                if not ready:
                    raise Broken(f"nobody has answered for {self._patience_s:g} s")
                for key, mask in ready:
                    _move(key.fileobj, mask, key.data, out, into)  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
                    place = key.data
                    _register(selector, self._sockets[place], place, len(out[place]), len(into[place]))
        return [received[place] for place in sizes]


def _register(
    selector: selectors.BaseSelector, connection: socket.socket, place: int, out: int, into: int
) -> None:
    """Wait for what is still to be done on a connection, if anything is."""
    events = (selectors.EVENT_WRITE if out else 0) | (selectors.EVENT_READ if into else 0)
    if events:
        selector.register(connection, events, place)


def _move(
    connection: socket.socket, mask: int, place: int, out: dict[int, memoryview], into: dict[int, memoryview]
) -> None:
    """Send and receive as far as it goes. Raises Broken where the connection has ended."""
    try:
        if mask & selectors.EVENT_WRITE:
            out[place] = out[place][connection.send(out[place][:PIECE]) :]
        if mask & selectors.EVENT_READ:
            count = connection.recv_into(into[place])
            if count == 0:
                raise Broken("a member has closed its connection")
            into[place] = into[place][count:]
    except BlockingIOError:
        return
    except OSError as error:
        raise Broken(f"a connection has ended ({error})") from error


@dataclass
class Carried:
    """A request that is carried when it is waited for."""

    carry: Callable[[], Any]
    started_s: float = 0.0
    finished_s: float = 0.0

    def wait(self) -> Any:
        self.started_s = time.perf_counter()
        answer = self.carry()
        self.finished_s = time.perf_counter()
        return answer


def _received(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises Broken where the connection ends before, TimeoutError where they do not come."""
    whole = bytearray(size)
    left = memoryview(whole)
    while left:
        count = connection.recv_into(left)
        if count == 0:
            raise Broken("a connection ended within a message")
        left = left[count:]
    return bytes(whole)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _door(worker: int) -> str:
    return f"door/{worker}"
