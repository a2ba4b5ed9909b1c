"""How a rank that was given up comes back: what both ends of a closed edge write down until it opens again.

The one that was given up is the *returning* rank, the other end takes it in. Each direction of an edge has a
word in the rendezvous store, which is changed by compare and set, so that both ends read the same of it:

    ``waits``     the returning rank has no edge left, and does nothing but wait
    ``trains``    it has others, and trains on
    ``at M``      the other end proposes to open the edge with exchange M
    ``yes M``     the returning rank will be there

Exchanges are numbered alike on all ranks that exchange; who waits takes the number over. Ranks that train in
step are never further apart than there are ranks, so that an edge of theirs is opened some exchanges ahead.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from distcomp.transports.bounded import ask_store
from distcomp.transports.types import Store

WAITS, TRAINS = "waits", "trains"
AT, YES = "at ", "yes "

HOLD_S = 2.0
"""So long a rank that waits may take to answer a proposal: it does nothing else."""

POLL_S = 0.02


@dataclass
class Return:
    """The word about ``returning``'s way back to ``host``. Every call raises PeerLost where the store is
    gone."""

    store: Store
    name: str
    """Of the attachment."""
    returning: int
    host: int

    def propose(self, number: int, ahead: int) -> bool:
        """The host's part before its exchange ``number``: whether the edge opens with it."""
        word, now = self._word(), f"{AT}{number}"
        if word == TRAINS:
            self._change(TRAINS, f"{AT}{number + ahead}")
        elif word == WAITS and self._change(WAITS, now) == now and (word := self._answer(now)) == now:
            word = self._change(now, WAITS)  # nobody said yes
        elif word == now:
            word = self._change(now, TRAINS)
        return word == f"{YES}{number}"

    def accept(self, number: int) -> int | None:
        """The returning rank's part before its exchange ``number``, while it trains: with which exchange the
        edge opens, if that is known."""
        word = self._word()
        if word.startswith(AT):
            proposed = number_of(word)
            word = self._change(word, f"{YES}{proposed}" if proposed >= number else TRAINS)
        if word.startswith(YES) and number_of(word) >= number:
            return number_of(word)
        if not word.startswith(AT):
            self.say(TRAINS)
        return None

    def proposed(self) -> str | None:
        """The proposal, if there is one."""
        word = self._word()
        return word if word.startswith(AT) else None

    def agree(self, proposal: str) -> int | None:
        """Say yes to it: with which exchange the edge opens; None if it is no longer meant."""
        number = number_of(proposal)
        return number if self._change(proposal, f"{YES}{number}") == f"{YES}{number}" else None

    def say(self, word: str) -> None:
        """Write ``waits`` or ``trains``, whatever was there."""
        ask_store(lambda: self.store.set(self._key, word))

    @property
    def _key(self) -> str:
        return f"distcomp/{self.name}/return/{self.returning}-{self.host}"

    def _word(self) -> str:
        def read() -> bytes:
            return self.store.get(self._key) if self.store.check([self._key]) else b""

        return ask_store(read).decode()

    def _change(self, expected: str, word: str) -> str:
        """``word`` in the place of ``expected``, if that is still there; what is there now."""
        return ask_store(lambda: self.store.compare_set(self._key, expected, word)).decode()

    def _answer(self, proposal: str) -> str:
        """What became of the proposal."""
        begin_s = time.monotonic()
        while (word := self._word()) == proposal and time.monotonic() - begin_s < HOLD_S:
            threading.Event().wait(POLL_S)
        return word


def number_of(word: str) -> int:
    """The exchange of ``at M`` or ``yes M``."""
    return int(word.split()[1])


def mark_returned(store: Store, name: str, rank: int, is_back: bool) -> None:
    """Note that a rank takes part in what all are asked again, or no longer."""
    key = returned_key(name, rank)
    ask_store(lambda: store.set(key, "back") if is_back else store.delete_key(key))


def returned_key(name: str, rank: int) -> str:
    return f"distcomp/{name}/returned/{rank}"
