"""Who is still there: heartbeats through the rendezvous store, and the agreement at the start.

A collective that times out says that *some* rank is missing. The heartbeat says which.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

from distcomp.errors import PeerLost, SettingsMismatch
from distcomp.transports.types import Store

LEFT = "left"


class Heartbeat:
    """Writes this rank's heartbeat to the store and reads the others'.

    A beat is a counter, so that no two clocks are ever compared. A rank whose counter stands still over
    :attr:`diagnosis_s` is lost. A rank that detaches or ends in order says so.
    """

    def __init__(self, store: Store, rank: int, size: int, name: str, interval_s: float = 1.0) -> None:
        # Its own connection: a blocked wait elsewhere must not stop the beat.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self._size = size
        self.name = name
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="distcomp-heartbeat", daemon=True)
        self._thread.start()

    @property
    def diagnosis_s(self) -> float:
        """Seconds until a rank that stopped is known to be lost."""
        return 3 * self._interval_s

    def close(self) -> None:
        """Say goodbye."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            self._store.set(self._key(self._rank), LEFT)
        except RuntimeError:  # the store's host has ended before us; nobody is left to read it
            return

    def leave_note(self, sentence: str) -> None:
        """Say why this rank stops, to those who will wait for it: :meth:`diagnose` reads it."""
        with suppress(RuntimeError):  # the store's host has ended before us; nobody is left to read it
            self._store.set(self._note_key(self._rank), sentence)

    def _notes(self) -> str:
        """What other ranks have said before they stopped."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        with suppress(RuntimeError):
            left = [rank for rank in others if self._store.check([self._note_key(rank)])]
            return "; ".join(f"rank {one}: {self._store.get(self._note_key(one)).decode()}" for one in left)
        return ""

    def _note_key(self, rank: int) -> str:
        return f"distcomp/{self.name}/note/{rank}"

    def silent(self) -> set[int]:
        """Other ranks whose heart stood still over :attr:`diagnosis_s`, or that have left. Takes as long."""
        before = self._read()
        self._stop.wait(self.diagnosis_s)
        after = self._read()
        return {rank for rank in range(self._size) if after[rank] == before[rank] and rank != self._rank}

    def diagnose(self, error: RuntimeError) -> PeerLost:
        """The error that names who is lost. Takes :attr:`diagnosis_s`; less where a rank left a note."""
        notes = self._notes()
        if notes:
            return PeerLost(notes)
        try:
            before = self._read()
            self._stop.wait(self.diagnosis_s)
            after = self._read()
        except RuntimeError:
            return PeerLost(
                "the rendezvous store does not answer: the process that hosts it (rank 0, or the "
                "launcher's agent) is lost; "
                f"restart from the last checkpoint ({_first_line(error)})"
            )
        others = [rank for rank in range(self._size) if rank != self._rank]
        left = [rank for rank in others if after[rank] == LEFT]
        lost = [rank for rank in others if after[rank] == before[rank] and rank not in left]
        if lost or left:
            sentences = []
            if lost:
                sentences.append(f"{_ranks(lost)} died or hangs (no heartbeat for {self.diagnosis_s:g} s)")
            if left:
                sentences.append(f"{_ranks(left)} ended or detached while others still exchange")
            return PeerLost(
                f"{'; '.join(sentences)}; restart from the last checkpoint ({_first_line(error)})"
            )
        return PeerLost(
            "an exchange failed or timed out while every rank is alive: some rank does not take part in "
            "it (did its "
            f"backward run?), or the network is cut; restart from the last checkpoint ({_first_line(error)})"
        )

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self._interval_s):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:  # the store is gone; whoever waits for a collective will find out and say so
                return

    def _beat(self, count: int) -> None:
        self._store.set(self._key(self._rank), str(count))

    def _key(self, rank: int) -> str:
        return f"distcomp/{self.name}/beat/{rank}"

    def _read(self) -> list[str]:
        return [self._store.get(self._key(rank)).decode() for rank in range(self._size)]


def agree(
    store: Store, rank: int, size: int, name: str, settings: Mapping[str, str], timeout_s: float
) -> None:
    """Compare every rank's settings; return on all ranks or raise on all ranks.

    Raises SettingsMismatch naming the first difference, PeerLost naming the ranks that did not come.
    """
    deadline = time.monotonic() + timeout_s
    store.set(f"distcomp/{name}/settings/{rank}", json.dumps(settings))
    theirs: dict[int, Mapping[str, str]] = {}
    missing = []
    for other in range(size):
        key = f"distcomp/{name}/settings/{other}"
        left_s = max(0.01, deadline - time.monotonic())
        try:
            store.wait([key], timedelta(seconds=left_s))
        except RuntimeError:
            missing.append(other)
            continue
        theirs[other] = json.loads(store.get(key))
    if missing:
        raise PeerLost(
            f"{_ranks(missing)} did not attach within {timeout_s:g} s; call distcomp.attach on every "
            "rank, in the same order"
        )
    for other in range(1, size):
        for setting in dict.fromkeys([*theirs[0], *theirs[other]]):
            first, second = theirs[0].get(setting), theirs[other].get(setting)
            if first != second:
                raise SettingsMismatch(
                    f"ranks were attached with different settings: {setting} is {first!r} on rank 0 and "
                    f"{second!r} on rank {other}; give every rank the same"
                )


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
