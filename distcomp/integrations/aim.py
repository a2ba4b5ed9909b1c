"""Aim: what each step took and sent, in an Aim repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcomp.errors import require
from distcomp.recording import scalars


class Aim:
    """A sink for ``handle.watch``: every number of a record as ``distcomp/<name>``, the rank as its context.

    Takes the folder of a repository, in which each rank has a run of its own, or an ``aim.Run`` of yours,
    which stays yours to close: give that on one rank only.
    """

    def __init__(self, where: str | Path | Any, experiment: str = "distcomp") -> None:
        self._aim, self._experiment = require("aim", "aim"), experiment
        self._folder = str(where) if isinstance(where, str | Path) else None
        self._run: Any = None if self._folder is not None else where
        self._rank = 0

    def begin(self, rank: int, size: int) -> None:
        """Open this rank's run; ``handle.watch`` calls it."""
        self._rank = rank
        if self._folder is not None:
            self._run = self._aim.Run(
                repo=self._folder, experiment=self._experiment, system_tracking_interval=None
            )

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._run.track(value, f"distcomp/{name}", step=record["step"], context={"rank": self._rank})

    def close(self) -> None:
        """Close the run, if it is the sink's own."""
        if self._folder is not None and self._run is not None:
            self._run.close()
