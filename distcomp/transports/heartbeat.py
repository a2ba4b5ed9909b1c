"""Who is still there, and who is named when an exchange fails.

Collectives tell that *somebody* is missing, after their timeout. The heartbeat tells who. Up to three ranks,
spread over the world, keep a notice board each (:mod:`distcomp.transports.board`), to which every rank says
once a second that it is there and how far it has come. What one says when it stops stays on the boards of the
others: nobody depends on the host of the rendezvous store, nor on whoever reports first.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from distcomp.errors import DistcompError, PeerLost
from distcomp.transports.board import Board, Connection, addresses, connect_to, listen
from distcomp.transports.bounded import STORE_SILENT, Result, bounded
from distcomp.transports.types import Store
from distcomp.transports.verdict import REMEDY, Findings, diagnosis

ANSWER_S = 1.0
"""So long one waits for the answers of boards; one whose host is stopped never answers."""

LOOK_S = 0.2

NOTHING = (0, "")
"""The activity of a rank that waits for nobody."""


class Heartbeat:
    """Says on every board that this rank is there, and reads from them who else is.

    A rank that nobody has heard for :attr:`diagnosis_s`, by a board's clock, is lost. One whose connections
    end without a goodbye is gone at once. One thread does it all; its sockets never block.

    Raises PeerLost where the boards' addresses cannot be had within ``timeout_s``.
    """

    def __init__(
        self, store: Store, rank: int, size: int, name: str, interval_s: float = 1.0, timeout_s: float = 60.0
    ) -> None:
        self.name = name
        self.timeout_s = timeout_s
        """Of the exchanges that are watched: a message names it."""
        self.progress: Callable[[], int] = lambda: 0
        """How many exchanges this rank has begun."""
        self.activity = NOTHING
        """What this rank waits for in an exchange, with the exchange's number: others tell one who waits from
        one who is slow."""
        self.diagnosed = False
        """Whether an exchange has failed."""
        self._rank, self._size = rank, size
        self._interval_s = interval_s
        self._notes: list[str] = []
        self._left = False
        self._stopped = False
        self._asked = self._served = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._board: Board | None = None
        self._listening: list[socket.socket] = []
        self._speakers: list[Connection] = []
        self._lines: dict[int, Connection] = {}
        self._token = secrets.token_hex(16)
        self._tokens: dict[int, str] = {}
        self._stopped = size == 1
        if size == 1:
            return
        self._waker, self._wakes = socket.socketpair()
        self._selector.register(self._wakes, selectors.EVENT_READ, lambda: self._wakes.recv(1 << 10))
        try:
            self._open(store)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="distcomp-heartbeat", daemon=True)
        self._thread.start()

    @property
    def diagnosis_s(self) -> float:
        """Seconds until a rank that stopped is known to be lost."""
        return 3 * self._interval_s

    def close(self) -> None:
        """Say goodbye."""
        if self._stopped:
            return
        self._left = True
        self._ask()
        self._stopped = True
        self._waker.send(b".")
        self._thread.join()
        self._release()  # not by the thread, which may be through before it is woken

    def leave_note(self, sentence: str) -> None:
        """Say why this rank stops, to those who will wait for it: :meth:`diagnose` reads it."""
        self._tell(f"rank {self._rank}: {sentence}")

    def look(self) -> Findings:
        """What is known of the other ranks now."""
        return self._ask()

    def diagnose(self, error: Exception) -> PeerLost:
        """The error that names who is lost; within :attr:`diagnosis_s` and a second.

        What it says stays on the boards, so that every rank says the same.
        """
        self.diagnosed = True
        begin_s = time.monotonic()
        while True:
            findings, took_s = self._ask(), time.monotonic() - begin_s
            certain = findings.notes or findings.gone
            likely = took_s >= self._interval_s and (findings.silent or findings.left)
            if certain or likely or took_s >= self.diagnosis_s:
                break
            threading.Event().wait(LOOK_S)
        said = "; ".join(findings.notes)
        if not said:
            said = diagnosis(findings, self._rank, self._size, self.diagnosis_s, self.timeout_s)
            self._tell(said)
        remedy = "" if REMEDY in said else f"; {REMEDY}"
        return PeerLost(f"{said}{remedy} ({_first_line(error)})")

    # ------------------------------------------------------------------------------------ asking the boards

    def _tell(self, note: str) -> None:
        self._notes.append(note)
        self._ask()

    def _ask(self) -> Findings:
        """What all boards that answer say together."""
        if self._size == 1 or self._stopped:
            return Findings()
        with self._changed:
            self._asked += 1
            number = self._asked
            self._waker.send(b".")
            self._changed.wait_for(lambda: self._answered(number), ANSWER_S)
            answers = {host: answer for host, answer in self._answers.items() if answer["id"] >= number}
        if not answers:
            return Findings(deaf=True)
        return Findings.of(list(answers.values()), self._rank, self._size, self.diagnosis_s)

    def _answered(self, number: int) -> bool:
        hosts = {*self._lines, *([self._rank] if self._board is not None else [])}
        return all(host in self._answers and self._answers[host]["id"] >= number for host in hosts)

    # ------------------------------------------------------------------------------------------ the boards

    def _open(self, store: Store) -> None:
        """Put up the board, if this rank keeps one, and reach those of the others."""
        if self._rank in keepers(self._size):
            self._board = Board(self._size)
            self._listening.append(listen())
            self._listening[0].setblocking(False)
            self._selector.register(self._listening[0], selectors.EVENT_READ, self._accept)
            address = {
                "hosts": addresses(store), "port": self._listening[0].getsockname()[1], "token": self._token
            }  # fmt: skip
            self._ask_store(lambda: store.set(self._key(self._rank), json.dumps(address)), self._rank)
        failures = []
        for host in set(keepers(self._size)) - {self._rank}:
            try:
                self._reach(host, store)
            except DistcompError as error:
                if isinstance(error, PeerLost):
                    raise
                failures.append(f"rank {host}'s board, {error}")
        if failures and not self._lines and self._board is None:
            raise DistcompError(f"rank {self._rank} reaches no notice board: {'; '.join(failures)}")
        if failures:
            warnings.warn(f"rank {self._rank} cannot reach {'; '.join(failures)}", stacklevel=5)

    def _reach(self, host: int, store: Store) -> None:
        """Connect to another rank's board."""
        key = self._key(host)

        def address() -> bytes:
            store.wait([key], timedelta(seconds=self.timeout_s))
            return store.get(key)

        where = json.loads(self._ask_store(address, host))
        line = connect_to(where)
        self._lines[host], self._tokens[host] = line, where["token"]
        self._selector.register(line.socket, selectors.EVENT_READ, lambda: self._read_answers(host))

    def _ask_store(self, call: Callable[[], Result], host: int) -> Result:
        try:
            return bounded(call, self.timeout_s + LOOK_S, STORE_SILENT)
        except RuntimeError as error:
            raise PeerLost(
                f"rank {host} was lost while attaching, or the host of the rendezvous store "
                f"({_first_line(error)}); {REMEDY}"
            ) from error

    def _key(self, rank: int) -> str:
        return f"distcomp/{self.name}/board/{rank}"

    # ------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        next_s, counted = 0.0, 0
        while not self._stopped:
            for key, _ in self._selector.select(max(0.0, next_s - time.monotonic())):
                key.data()
            if time.monotonic() >= next_s or self._asked > counted:
                next_s, counted = time.monotonic() + self._interval_s, self._asked
                self._beat(counted)

    def _release(self) -> None:
        self._selector.close()
        for line in (*self._lines.values(), *self._speakers):
            line.close()
        for end in (*self._listening, self._waker, self._wakes):
            end.close()

    def _beat(self, number: int) -> None:
        at, (during, doing) = self.progress(), self.activity
        message = {
            "rank": self._rank, "id": number, "at": at, "doing": doing if during == at else "",
            "ask": number > self._served, "left": self._left, "notes": self._notes,
        }  # fmt: skip
        self._served = number
        if self._board is not None:
            self._heard(self._rank, self._board.hear(message))
        for host, line in list(self._lines.items()):
            try:
                line.say({**message, "token": self._tokens[host]})
            except OSError:
                self._drop(host)

    def _heard(self, host: int, answer: dict[str, Any]) -> None:
        if "view" not in answer:  # to a beat that asked nothing
            return
        with self._changed:
            self._answers[host] = answer
            self._changed.notify_all()

    def _drop(self, host: int) -> None:
        """A board is gone, with its host."""
        line = self._lines.pop(host)
        self._selector.unregister(line.socket)
        line.close()
        with self._changed:
            self._changed.notify_all()

    def _read_answers(self, host: int) -> None:
        messages = self._lines[host].hear()
        if messages is None:
            self._drop(host)
            return
        for answer in messages:
            self._heard(host, answer)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listening[0].accept()
            line = Connection(connection)
            self._speakers.append(line)
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._read_words(line))

    def _read_words(self, line: Connection) -> None:
        """What a rank says to the board here. Who does not know the token is not heard."""
        assert self._board is not None
        messages = line.hear()
        try:
            if messages is None or any(message["token"] != self._token for message in messages):
                raise OSError
            for message in messages:
                line.rank = int(message["rank"])
                line.say(self._board.hear(message))
        except (OSError, LookupError, TypeError, ValueError):
            self._selector.unregister(line.socket)
            self._speakers.remove(line)
            line.close()
            if line.rank is not None:
                self._board.closed(line.rank)


def keepers(size: int) -> tuple[int, ...]:
    """Who keeps a board: the first, the middle and the last rank, which are seldom on one host."""
    return tuple(sorted({0, size // 2, size - 1})) if size > 1 else ()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
