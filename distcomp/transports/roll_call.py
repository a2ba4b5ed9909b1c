"""Who takes part in what all ranks ask, where some may be lost: who comes, as one writes down for all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Mapping

from distcomp.errors import PeerLost
from distcomp.transports.bounded import ask_store
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.patience import EVERYONE, LOOK_S, Patience
from distcomp.transports.returning import returned_key
from distcomp.transports.types import Store
from distcomp.transports.verdict import ranks

POLL_S = 0.02


class RollCall:
    """Held in the rendezvous store, which must outlive every rank. Each wait is bounded."""

    def __init__(self, store: Store, heartbeat: Heartbeat, rank: int, size: int, timeout_s: float) -> None:
        self._store = store
        self._heartbeat = heartbeat
        self._rank, self._size = rank, size
        self._timeout_s = timeout_s

    def take(self, without: Mapping[int, str]) -> tuple[tuple[int, ...], dict[int, str]]:
        """The ranks that came, and of each other one why it is not waited for, equal on all ranks.

        ``without``: those that this rank knows to be lost, and why.

        Raises PeerLost where the others have decided without this rank, or do not come to it.
        """
        number = self._heartbeat.progress()  # equal on those who ask for the same, and on no others
        key = f"distcomp/{self._heartbeat.name}/rollcall{number}"
        ask_store(lambda: self._store.set(f"{key}/{self._rank}", "here"))
        patience = Patience(self._heartbeat, number, EVERYONE, self._timeout_s)
        back = self._back(without)
        lost = {rank: reason for rank, reason in without.items() if rank not in back}
        missing = set(range(self._size)) - {self._rank, *lost}
        looked_s = time.monotonic()
        while (decided := self._decided(key)) is None:
            missing -= self._here(key, missing)
            if missing and time.monotonic() - looked_s > LOOK_S:
                looked_s = time.monotonic()
                lost |= patience.lost(missing)
                missing -= set(lost)
            if not missing:
                self._decide(key, lost)
            else:
                threading.Event().wait(POLL_S)
        came, lost = decided
        if self._rank not in came:
            raise PeerLost(
                f"{ranks(came)} averaged without rank {self._rank}, which did not come within "
                f"timeout_s={self._timeout_s:g}; restart it from a checkpoint, and give distcomp.attach a "
                "longer timeout_s where it only computes longer"
            )
        return came, lost

    def _here(self, key: str, among: Collection[int]) -> set[int]:
        return ask_store(lambda: {one for one in among if self._store.check([f"{key}/{one}"])})

    def _back(self, among: Collection[int]) -> set[int]:
        """Those that were lost, and have been taken in again by others."""
        name = self._heartbeat.name
        return ask_store(lambda: {one for one in among if self._store.check([returned_key(name, one)])})

    def _decided(self, key: str) -> tuple[tuple[int, ...], dict[int, str]] | None:
        def read() -> bytes | None:
            return self._store.get(f"{key}/members") if self._store.check([f"{key}/members"]) else None

        written = ask_store(read)
        if written is None:
            return None
        came, lost = json.loads(written)
        return tuple(came), {int(rank): reason for rank, reason in lost.items()}

    def _decide(self, key: str, lost: Mapping[int, str]) -> None:
        """Write down who came, unless somebody was faster. Fewer than half of those alive decide nothing:
        the others train on."""
        found = self._heartbeat.look()
        alive = set(range(self._size)) - found.gone - found.left - found.silent
        came = sorted(self._here(key, alive))
        if 2 * len(came) > len(alive) or (2 * len(came) == len(alive) and min(alive) in came):
            decided = json.dumps([came, {rank: lost[rank] for rank in sorted(lost) if rank not in came}])
            ask_store(lambda: self._store.compare_set(f"{key}/members", "", decided))
            return
        ask_store(lambda: self._store.delete_key(f"{key}/{self._rank}"))
        if self._decided(key) is not None:
            return
        why = "; ".join(f"rank {rank} {reason}" for rank, reason in sorted(lost.items()))
        raise PeerLost(
            f"rank {self._rank} came to average or to detach, and most others do not ({why}): it ends alone, "
            "with its own weights; give every rank as many steps, and call on every rank what averages"
        )
