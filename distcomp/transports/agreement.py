"""The agreement at the start: every rank's settings compared, and every rank told the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from distcomp.errors import DistcompError, PeerLost, SettingsMismatch
from distcomp.transports.bounded import STORE_SILENT, ask_store, bounded
from distcomp.transports.types import Store
from distcomp.transports.verdict import ranks

SLICE_S = 1.0
"""So often one who waits looks whether another rank was refused."""

PARTING_S = 4.0
"""So long one who raises waits until the others have read why: with its host the store ends, too."""


class Agreement:
    """What one ``attach`` of one rank says to the others, through the rendezvous store.

    Every wait is bounded. Who finds a difference, or is refused, stays until the others have read it.
    """

    def __init__(self, store: Store, rank: int, size: int, name: str, timeout_s: float) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._name = name
        self._timeout_s = timeout_s
        self._refused = f"distcomp/{name}/refused"

    def agree(
        self, settings: Mapping[str, str], details: Mapping[str, Sequence[str]]
    ) -> list[Mapping[str, str]]:
        """Compare every rank's settings, and digests of the ``details``; return all ranks' settings.

        Raises SettingsMismatch naming the first difference, PeerLost naming the ranks that did not come,
        DistcompError where a rank was refused.
        """
        digests = {name: f"{len(lines)} entries, digest {_digest(lines)}" for name, lines in details.items()}
        self._set(SETTINGS, {**settings, **digests})
        theirs, missing = self._everyone(SETTINGS, self._timeout_s)
        if self._is_refused():
            sentence = ask_store(lambda: self._store.get(self._refused)).decode()
            self._part()
            raise DistcompError(sentence)
        if missing:
            raise PeerLost(
                f"{ranks(missing)} did not attach within {self._timeout_s:g} s (timeout_s); call "
                "distcomp.attach on every rank, in the same order"
            )
        difference = self._difference(theirs, details)
        if difference is not None:
            self._part()
            raise SettingsMismatch(difference)
        return [theirs[rank] for rank in range(self._size)]

    def refuse(self, sentence: str) -> None:
        """Tell the others why this rank will not attach. Nothing is raised here."""
        with suppress(PeerLost):  # the store's host has gone: nobody is left to read it
            refusal = f"rank {self._rank} was refused: {sentence}"
            ask_store(lambda: self._store.compare_set(self._refused, "", refusal))
            self._part()

    def _difference(
        self, theirs: Mapping[int, Mapping[str, str]], details: Mapping[str, Sequence[str]]
    ) -> str | None:
        """The first difference from rank 0, in words."""
        for other in range(1, self._size):
            for setting in dict.fromkeys([*theirs[0], *theirs[other]]):
                first, second = theirs[0].get(setting), theirs[other].get(setting)
                if first == second or setting.startswith(PROPOSED):
                    continue
                if setting in details:
                    setting, first, second = self._first_detail(setting, details[setting], other)
                return (
                    f"ranks were attached with different settings: {setting} is {first!r} on rank 0 and "
                    f"{second!r} on rank {other}; give every rank the same"
                )
        return None

    def _first_detail(self, setting: str, lines: Sequence[str], other: int) -> tuple[str, str, str]:
        """Where two lists whose digests differ first do."""
        self._set(f"details/{setting}", list(lines))
        lines_of, _ = self._everyone(f"details/{setting}", PARTING_S, (0, other))
        mine, others = list(lines_of.get(0, ())), list(lines_of.get(other, ()))
        length = max(len(mine), len(others))
        pairs = zip(_padded(mine, length), _padded(others, length), strict=True)
        first, second = next(((a, b) for a, b in pairs if a != b), ("unknown", "unknown"))
        return f"one of the {setting}", first, second

    def _part(self) -> None:
        self._set("parting", True)
        self._everyone("parting", PARTING_S)

    def _everyone(
        self, what: str, patience_s: float, whom: Sequence[int] | None = None
    ) -> tuple[dict[int, Any], list[int]]:
        """What ranks have said within ``patience_s``, and who has not. One that is refused ends the wait."""
        deadline_s = time.monotonic() + patience_s
        said: dict[int, Any] = {}
        missing: list[int] = []
        for rank in range(self._size) if whom is None else whom:
            answer = self._wait_for(what, rank, deadline_s)
            if answer is None:
                missing.append(rank)
            else:
                said[rank] = json.loads(answer)
        return said, missing

    def _wait_for(self, what: str, rank: int, deadline_s: float) -> bytes | None:
        """What a rank has said; None where it has not, or where another was refused meanwhile."""
        key = self._key(what, rank)

        def get() -> bytes:
            self._store.wait([key], timedelta(seconds=left_s))
            return self._store.get(key)

        while True:
            left_s = min(SLICE_S, max(0.01, deadline_s - time.monotonic()))
            try:
                return bounded(get, left_s + 1.0, STORE_SILENT)
            except RuntimeError:
                refused = self._is_refused()  # raises where the store is gone, which is no timeout
                if time.monotonic() >= deadline_s or (what == SETTINGS and refused):
                    return None

    def _is_refused(self) -> bool:
        return ask_store(lambda: self._store.check([self._refused]))

    def _set(self, what: str, value: object) -> None:
        ask_store(lambda: self._store.set(self._key(what, self._rank), json.dumps(value)))

    def _key(self, what: str, rank: int) -> str:
        return f"distcomp/{self._name}/{what}/{rank}"


SETTINGS = "settings"
PROPOSED = "proposed "
"""Begins the name of a setting that ranks need not have in common."""


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _padded(lines: list[str], length: int) -> list[str]:
    return lines + ["nothing"] * (length - len(lines))
