"""A notice board: one rank keeps what all ranks say of themselves, over sockets of its own.

Lines of JSON. A rank says ``{"rank", "token", "id", "at", "doing", "ask", "left", "notes"}``; the board
answers ``{"id", "notes"}``, and with ``ask`` a ``"view"`` of every rank. Ages are durations by the board's
own clock: no two clocks are ever compared.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from distcomp.errors import DistcompError
from distcomp.transports.types import Store, TCPStore

LONGEST_LINE = 1 << 20
LONGEST_NOTE = 2000
CONNECT_S = 5.0
LOOPBACK = "127.0.0.1"
HERE, LEFT, GONE = "here", "left", "gone"


@dataclass
class Board:
    """What is known of each rank: when it was heard, how far it has come, what it waits for, whether it left
    or is gone.
    """

    size: int
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._heard_s = [time.monotonic()] * self.size
        self._states = [HERE] * self.size
        self._at = [0] * self.size
        self._doing = [""] * self.size

    def hear(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Take in what a rank says; the answer to it."""
        rank = int(message["rank"])
        self._heard_s[rank] = time.monotonic()
        self._at[rank], self._doing[rank] = int(message["at"]), str(message["doing"])
        self._states[rank] = LEFT if message["left"] else HERE
        self.notes += [note[:LONGEST_NOTE] for note in message["notes"] if note not in self.notes]
        answer = {"id": message["id"], "notes": self.notes}
        return {**answer, "view": self._view()} if message["ask"] else answer

    def closed(self, rank: int) -> None:
        """A rank's connection has ended: without a goodbye, the rank is gone."""
        if self._states[rank] == HERE:
            self._states[rank] = GONE

    def _view(self) -> list[tuple[float, str, int, str]]:
        now_s = time.monotonic()
        ages_s = [now_s - heard_s for heard_s in self._heard_s]
        return list(zip(ages_s, self._states, self._at, self._doing, strict=True))


class Connection:
    """A connection that carries lines of JSON and never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.rank: int | None = None
        """Of a board's own: who speaks, once it has said so."""
        self._incoming, self._outgoing = b"", b""

    def say(self, message: Mapping[str, Any]) -> None:
        """Send, as far as the connection takes it; what it does not take goes with the next.

        A peer that reads nothing is told nothing more: it is stopped, and will not answer either.
        """
        if len(self._outgoing) < LONGEST_LINE:
            self._outgoing += json.dumps(message).encode() + b"\n"
        with suppress(BlockingIOError):
            self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]

    def hear(self) -> list[dict[str, Any]] | None:
        """The whole lines that have come; None where the connection has ended or carries something else."""
        try:
            while chunk := self.socket.recv(1 << 16):
                self._incoming += chunk
                if len(self._incoming) > LONGEST_LINE:
                    return None
            return None
        except BlockingIOError:
            *lines, self._incoming = self._incoming.split(b"\n")
        except OSError:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.socket.close()


def listen() -> socket.socket:
    """A socket on a free port of every interface, as Gloo's and NCCL's."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def addresses(store: Store) -> list[str]:
    """By which others may reach this host, the likeliest first.

    The address of the interface that ``GLOO_SOCKET_IFNAME`` names; the one from which the rendezvous store is
    reached; the host's name.
    """
    known = []
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        known.append(_address_of(named))
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        known.append(_address_towards(store.host, store.port))
    return list(dict.fromkeys([address for address in known if address] + [socket.gethostname()]))


def _address_towards(host: str, port: int) -> str | None:
    """The address of this host on the way to another; nothing is sent."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface of this host."""
    import fcntl  # Linux alone has it, and needs it only where an interface is named

    SIOCGIFADDR = 0x8915
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, interface.encode()[:15].ljust(256, b"\0"))
        return socket.inet_ntoa(answer[20:24])
    return None


def connect_to(board: Mapping[str, Any]) -> Connection:
    """Reach ``board`` as :func:`reach` does."""
    return Connection(reach(board))


def reach(board: Mapping[str, Any]) -> socket.socket:
    """Connect to where ``board`` listens (``hosts``, ``port``), by the first of its addresses that leads to
    it.

    Raises DistcompError with every address that was tried; its cause says how the last one failed.
    """
    failures: list[str] = []
    last: OSError | None = None
    on_this_host = [LOOPBACK] if board["hosts"][-1] == socket.gethostname() else []
    for host in [*board["hosts"], *on_this_host]:
        try:
            return socket.create_connection((host, board["port"]), CONNECT_S)
        except OSError as error:
            failures.append(f"{host}: {error.strerror or error}")
            last = error
    raise DistcompError(
        f"port {board['port']} of {' or '.join(failures)}: cannot be reached; let all TCP through between "
        "the nodes of a job, and name the interface in GLOO_SOCKET_IFNAME"
    ) from last
