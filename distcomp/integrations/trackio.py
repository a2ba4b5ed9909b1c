"""trackio: what each step took and sent, in its local database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distcomp.errors import require
from distcomp.recording import scalars


class Trackio:
    """A sink for ``handle.watch``: every number of a record as ``distcomp/<name>``.

    Takes a ``project`` and what else ``trackio.init`` takes; each rank has a run of its own. Where the
    database lies is trackio's to say (``TRACKIO_DIR``).
    """

    def __init__(self, project: str = "distcomp", name: str = "run", **settings: Any) -> None:
        self._trackio = require("trackio", "trackio")
        self._project, self._name, self._settings = project, name, settings
        self._run: Any = None

    def begin(self, rank: int, size: int) -> None:
        """Open this rank's run; ``handle.watch`` calls it."""
        self._run = self._trackio.init(
            project=self._project, name=f"{self._name}-rank{rank}", **self._settings
        )

    def __call__(self, record: Mapping[str, Any]) -> None:
        values = {f"distcomp/{name}": value for name, value in scalars(record).items()}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Write what waits to be written, and end the run."""
        if self._run is not None:
            self._run.finish()
