"""Rounds of workers that come and go: who takes part in the next one, and whether it counts.

Everything is written in the rendezvous store, which must outlive every worker, and changed there by compare
and set, so that all read the same:

    ``round7/0/here/3``     worker 3 has come to round 7, first attempt: for what, and what it weighs
    ``round7/0/members``    who takes part: written once, by whoever first sees the round closed
    ``round7/0/done``       how many of them are through
    ``round7/0/outcome``    ``ok`` once all are; ``again`` where one was lost before that
    ``latest``              the last round that counts, and its members
    ``at/3``                the round that worker 3, who was away or is new, will come to next

A round that fails is held again, among those who are left, with what each brought to it: none is lost.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from distcomp.errors import PeerLost
from distcomp.transports.bounded import ask_store
from distcomp.transports.mesh import Broken, MemberLine, Mesh
from distcomp.transports.types import Store

Result = TypeVar("Result")

POLL_S = 0.01
PROBE_S = 1.0
"""So often those who have not come are knocked at: a dead one is not waited for."""
AGAIN, OK = "again", "ok"


class Missed(PeerLost):
    """A round was closed without this worker."""


@dataclass(frozen=True)
class Round:
    """A round that is closed: who takes part, and what each weighs."""

    number: int
    attempt: int
    members: tuple[int, ...]
    weights: tuple[float, ...]

    def share(self, worker: int) -> float:
        """A worker's weight as a multiple of the members' mean weight; 1 where nobody weighs anything."""
        total = sum(self.weights)
        return len(self.members) * self.weights[self.members.index(worker)] / total if total else 1.0


@dataclass
class OuterRounds:
    """Worker ``mesh.me``'s side. Rounds are numbered alike on all who take part; ``number``: the last one.

    ``members``: who took part in it; ``expected``: who is waited for in the next. ``lost``: why others are
    not.
    """

    store: Store
    mesh: Mesh
    quorum: int
    grace_s: float
    timeout_s: float
    expected: set[int]
    number: int = 0
    lost: dict[int, str] = field(default_factory=dict)
    members: tuple[int, ...] = ()
    _line: tuple[tuple[int, ...], MemberLine] | None = None
    _said: dict[int, str] = field(default_factory=dict)
    """To which round others have said that they come, as far as this worker has read it."""
    _dismissed: dict[int, str] = field(default_factory=dict)
    """What those had said who then did not come: they are not waited for until they say something else."""
    _awaited: set[int] = field(default_factory=set)

    def carry(
        self, what: str, weight: float, exchange: Callable[[MemberLine, Round], Result], is_open: bool = True
    ) -> Result:
        """Hold the next round, which is about ``what`` for all who take part; what ``exchange`` returned in
        the attempt that counts. ``is_open``: whether it waits for those who are new, too.

        Raises Missed where it was held without this worker, PeerLost where fewer than the quorum come within
        ``timeout_s``.
        """
        number = self.number + 1
        for attempt in count():
            held = self._called(number, attempt, json.dumps([what, weight]), is_open)
            result = None
            with suppress(Broken):
                result = (exchange(self._line_of(held), held),)
            if self._counts(held, whole=result is not None):
                assert result is not None
                self._commit(held)
                return result[0]
            self._hang_up()  # what is left on the lines is of an exchange that ended in its middle
            self.expected &= set(held.members)
        raise AssertionError("attempts do not end")

    def downloaded(self, least: int, read: Callable[[bytes], Result]) -> Result:
        """What a member of the last round hands over, of round ``least`` or a later one.

        Raises PeerLost where nobody does within ``timeout_s``.
        """
        waiting = _Waiting(1)
        while waiting.waited_s < self.timeout_s:
            members = self.latest()[1]
            for worker in members:
                if worker == self.mesh.me:
                    continue
                try:
                    wire = self.mesh.download(worker, least, self.timeout_s)
                except Broken:
                    continue
                return read(wire)
            threading.Event().wait(POLL_S)
        raise PeerLost(
            f"{_named(members)} handed nothing over to worker {self.mesh.me} within "
            f"timeout_s={self.timeout_s:g}; start it again, or restart all from the last checkpoint"
        )

    def come_to(self, number: int) -> None:
        """Take part from round ``number`` on; the others learn to wait for this worker."""
        self.number, self.members = number - 1, self.latest()[1]
        self.expected = {*self.members, self.mesh.me}
        self._hang_up()
        self._set(f"at/{self.mesh.me}", str(number))

    def latest(self) -> tuple[int, tuple[int, ...]]:
        """The last round that counts, and who took part."""
        number, members = json.loads(self._get("latest") or "[0, []]")
        return number, tuple(members)

    def close(self) -> None:
        self._hang_up()
        self.mesh.close()

    # ------------------------------------------------------------------------------------- who takes part

    def _called(self, number: int, attempt: int, mine: str, is_open: bool) -> Round:
        """Come to an attempt, and wait until it is closed."""
        key, me = f"round{number}/{attempt}", self.mesh.me
        if attempt == 0 and self.latest()[0] >= number:
            raise self._missed(number)
        self._set(f"{key}/here/{me}", mine)
        here, waiting = {me: mine}, _Waiting(self.quorum)
        if attempt:  # somebody was lost just now
            waiting.gone = {worker for worker in self.expected if self.mesh.is_gone(worker)}
        expected = self.expected | (self._announced(number) if is_open else set())
        while (decided := self._get(f"{key}/members")) is None:
            here |= self._here(key, expected - set(here))
            missing = expected - set(here) - waiting.gone
            waited_s = waiting.since_quorum_s(len(here))
            if waited_s is not None and (not missing or waited_s >= self.grace_s):
                here |= self._here(key, self._everybody - set(here))
                self._swap(f"{key}/members", json.dumps(_alike(here, me)))
                continue
            if waited_s is None and waiting.waited_s >= self.timeout_s:
                raise self._too_few(number, here, missing, waiting.gone)
            if waiting.time_to_look():
                waiting.gone |= {worker for worker in missing if self.mesh.is_gone(worker)}
                expected |= self._announced(number) if is_open else set()
            threading.Event().wait(POLL_S)
        self._awaited = expected
        members, weights = json.loads(decided)
        if me in members:
            return Round(number, attempt, tuple(members), tuple(weights))
        if self._get(f"{key}/outcome") == AGAIN:
            return self._called(number, attempt + 1, mine, is_open)
        raise self._missed(number)

    def _here(self, key: str, among: Collection[int]) -> dict[int, str]:
        said = {worker: self._get(f"{key}/here/{worker}") for worker in among}
        return {worker: mine for worker, mine in said.items() if mine is not None}

    def _announced(self, number: int) -> set[int]:
        """Who was away or is new, and will come to this round."""
        at = {worker: self._get(f"at/{worker}") for worker in self._everybody - self.expected}
        self._said |= {worker: says for worker, says in at.items() if says is not None}
        return {
            worker
            for worker, says in self._said.items()
            if int(says) <= number and says != self._dismissed.get(worker)
        }

    @property
    def _everybody(self) -> set[int]:
        """All workers that there have ever been."""
        return set(range(int(self._get("workers") or 0)))

    def _missed(self, number: int) -> Missed:
        latest, members = self.latest()
        return Missed(
            f"worker {self.mesh.me} came to outer round {number} after {_named(members)} had closed it "
            f"(they have held {latest}); give on_failure a longer grace_s where it only computes longer"
        )

    def _too_few(
        self, number: int, came: Collection[int], missing: Collection[int], gone: Collection[int]
    ) -> PeerLost:
        died = f"; {_named(gone)} died or ended" if gone else ""
        silent = f"; {_named(missing)} did not come, although alive" if missing else ""
        return PeerLost(
            f"{len(came)} of at least {self.quorum} workers (the quorum) came to outer round "
            f"{number} within timeout_s={self.timeout_s:g}: {_named(came)}{died}{silent}; let others join, "
            "or restart from the last checkpoint with a smaller quorum"
        )

    # ------------------------------------------------------------------------------------ whether it counts

    def _line_of(self, held: Round) -> MemberLine:
        """The connections of the members, which are kept as long as these stay the same."""
        if self._line is None or self._line[0] != held.members:
            self._hang_up()
            epoch = (held.number, held.attempt)
            outcome = f"round{held.number}/{held.attempt}/outcome"
            line = self.mesh.line(held.members, epoch, self.timeout_s, lambda: self._get(outcome) is not None)
            self._line = held.members, line
        return self._line[1]

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line[1].close()
            self._line = None

    def _counts(self, held: Round, whole: bool) -> bool:
        """Whether all members are through. One that is lost before makes all hold the round again."""
        key = f"round{held.number}/{held.attempt}"
        if not whole:
            return self._swap(f"{key}/outcome", AGAIN) == OK
        if ask_store(lambda: self.store.add(f"{key}/done", 1)) == len(held.members):
            return self._swap(f"{key}/outcome", OK) == OK
        waiting = _Waiting(1)
        while (outcome := self._get(f"{key}/outcome")) is None:
            others = set(held.members) - {self.mesh.me}
            if waiting.waited_s >= self.timeout_s or (
                waiting.time_to_look() and any(self.mesh.is_gone(worker) for worker in others)
            ):
                self._swap(f"{key}/outcome", AGAIN)
            else:
                threading.Event().wait(POLL_S)
        return outcome == OK

    def _commit(self, held: Round) -> None:
        for worker in self._awaited - set(held.members):
            self._dismissed[worker] = self._said.get(worker, "")
            self.lost[worker] = (
                "died or has ended"
                if self.mesh.is_gone(worker)
                else f"did not come to outer round {held.number} within grace_s={self.grace_s:g}"
            )
        for worker in held.members:
            self.lost.pop(worker, None)
        self.number, self.members, self.expected = held.number, held.members, set(held.members)
        if held.members[0] == self.mesh.me:
            self._set("latest", json.dumps([held.number, held.members]))
            self._forget(held.number - 2, held.members)

    def _forget(self, number: int, members: Collection[int]) -> None:
        """Delete what is written of an old round; ``latest`` tells whoever comes to it that it is over."""
        names = ["members", "done", "outcome", *(f"here/{worker}" for worker in members)]
        for name in names:
            ask_store(lambda name=name: self.store.delete_key(f"round{number}/0/{name}"))  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------- the store

    def _get(self, key: str) -> str | None:
        def read() -> bytes | None:
            return self.store.get(key) if self.store.check([key]) else None

        found = ask_store(read)
        return None if found is None else found.decode()

    def _set(self, key: str, value: str) -> None:
        ask_store(lambda: self.store.set(key, value))

    def _swap(self, key: str, value: str) -> str:
        """Write ``value`` unless something is there; what is there now."""
        return ask_store(lambda: self.store.compare_set(key, "", value)).decode()


@dataclass
class _Waiting:
    """How long one has waited, and since when the quorum is there; by this worker's clock alone."""

    quorum: int
    begin_s: float = field(default_factory=time.monotonic)
    gone: set[int] = field(default_factory=set)
    _quorum_s: float | None = None
    _looked_s: float = field(default_factory=time.monotonic)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.begin_s

    def time_to_look(self) -> bool:
        """Whether to look now who has died; not again for a while."""
        if time.monotonic() - self._looked_s < PROBE_S:
            return False
        self._looked_s = time.monotonic()
        return True

    def since_quorum_s(self, came: int) -> float | None:
        """Seconds since the quorum came; None while it has not."""
        if came < self.quorum:
            return None
        if self._quorum_s is None:
            self._quorum_s = time.monotonic()
        return time.monotonic() - self._quorum_s


def _alike(here: dict[int, str], me: int) -> tuple[list[int], list[float]]:
    """The workers that came for the same as this one, and what they weigh.

    Raises PeerLost where more came for something else.
    """
    said = {worker: json.loads(text) for worker, text in sorted(here.items())}
    groups: dict[str, list[int]] = {}
    for worker, (what, _) in said.items():
        groups.setdefault(what, []).append(worker)
    most = max(groups.values(), key=len)  # of equals, the one with the lowest worker
    mine = said[me][0]
    if me not in most:
        raise PeerLost(
            f"worker {me} came for {mine} and {_named(most)} for {said[most[0]][0]}: it ends alone, with its "
            "own weights; give every worker as many steps (count handle.stats()['iterations']), and call on "
            "every one what averages"
        )
    return most, [said[worker][1] for worker in most]


def _named(workers: Collection[int]) -> str:
    listed = sorted(workers)
    return ("worker " if len(listed) == 1 else "workers ") + ", ".join(map(str, listed))
