"""Weights & Biases: what each step took and sent, beside the curves that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distcomp.errors import require
from distcomp.recording import scalars


class WandB:
    """A sink for ``handle.watch``: every number of a record as ``distcomp/<name>`` over ``distcomp/step``.

    Takes what ``wandb.init`` takes (``project``, ``mode="offline"``, ``dir``): each rank then has a run of
    its own, in one ``group``. Or a ``run`` of yours, which stays yours to finish: what a step says then goes
    with your next ``run.log``; give that on one rank only.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._wandb = require("wandb", "wandb")
        self._run, self._settings, self._own = run, settings, run is None

    def begin(self, rank: int, size: int) -> None:
        """Open this rank's run; ``handle.watch`` calls it."""
        if self._own:
            group = self._settings.pop("group", "distcomp")
            self._run = self._wandb.init(
                name=f"rank{rank}", group=group, reinit="create_new", **self._settings
            )
        self._run.define_metric("distcomp/*", step_metric="distcomp/step")

    def __call__(self, record: Mapping[str, Any]) -> None:
        values = {f"distcomp/{name}": value for name, value in scalars(record).items()}
        self._run.log({**values, "distcomp/step": record["step"]}, commit=self._own)

    def close(self) -> None:
        """Finish the run, if it is the sink's own."""
        if self._own and self._run is not None:
            self._run.finish()
