"""All ranks take over a checkpoint, of the same step, or none does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from distcomp.errors import DistcompError, Mismatch, PeerLost
from distcomp.transports.types import Store

Fields = dict[str, Any]
ALIKE = ("iterations", "seed", "method", "parameters", "world_size", "tracks", "exchanges")
"""What every rank's part must say alike."""


class Loads:
    """The loads of one attached model, counted alike on every rank.

    Each rank leaves in the store what it has read, or why it cannot be read, and all decide by these notes.
    Nobody waits for another longer than the timeout.
    """

    def __init__(self, store: Store, rank: int, ranks: tuple[int, ...], name: str, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._name = name
        self._timeout_s = timeout_s
        self._count = 0

    def agreed(self, read: Callable[[], Fields]) -> Fields:
        """What ``read`` returns, if it returns on every rank and says the same of itself.

        Raises, on every rank the same sentence: DistcompError where a rank's part cannot be read, Mismatch
        where parts differ; PeerLost where a rank does not load within the timeout.
        """
        self._count += 1
        fields: Fields = {}
        try:
            fields = read()
            own: dict[str, Any] = {"alike": {name: _plain(fields.get(name)) for name in ALIKE}}
        except DistcompError as error:
            own = {"error": str(error)}
        except BaseException as error:
            self._say({"error": f"{type(error).__name__}: {error}"})
            raise
        self._say(own)
        notes = self._notes()
        _decide(notes)
        return fields

    def _key(self, rank: int) -> str:
        return f"distcomp/loads/{self._name}/{self._count}/{rank}"

    def _say(self, note: Mapping[str, Any]) -> None:
        self._store.set(self._key(self._rank), json.dumps(note))

    def _notes(self) -> dict[int, dict[str, Any]]:
        """Every rank's note. Who gives up waiting says so, that nobody who comes later goes on."""
        deadline_s = time.monotonic() + self._timeout_s
        notes, missing = {}, []
        for rank in self._ranks:
            left_s = max(0.01, deadline_s - time.monotonic())
            try:
                self._store.wait([self._key(rank)], timedelta(seconds=left_s))
                notes[rank] = json.loads(self._store.get(self._key(rank)))
            except RuntimeError:
                missing.append(rank)
        if missing:
            who = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
            sentence = (
                f"{who} did not load a checkpoint within {self._timeout_s:g} s, and rank {self._rank} did; "
                "load on every rank alike, and restart from the last checkpoint"
            )
            self._say({"error": sentence})
            raise PeerLost(sentence)
        return notes


def _plain(value: object) -> str:
    """As text that is equal for equal things, whatever the order of a mapping."""
    if isinstance(value, Mapping):
        return repr(sorted((str(key), _plain(each)) for key, each in value.items()))
    return repr(value)


def _decide(notes: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise, by all ranks' notes, what stands against taking over: the same on every rank."""
    errors = {rank: note["error"] for rank, note in notes.items() if "error" in note}
    if errors:
        rank, sentence = next(iter(errors.items()))
        alike = len(errors) == len(notes) and len(set(errors.values())) == 1
        raise DistcompError(
            sentence if alike else f"rank {rank} cannot load the checkpoint, so no rank does: {sentence}"
        )
    (first, reference), *others = notes.items()
    for rank, note in others:
        for name, value in note["alike"].items():
            wanted = reference["alike"][name]
            if value != wanted:
                raise Mismatch(
                    f"ranks load parts that do not belong together: {name} is {wanted[:200]} on rank "
                    f"{first} and {value[:200]} on rank {rank}; use a checkpoint that "
                    "every rank saved in the same step"
                )
