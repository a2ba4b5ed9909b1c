"""TensorBoard: what each step took and sent, beside the curves that are there already."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcomp.errors import require
from distcomp.recording import scalars


class TensorBoard:
    """A sink for ``handle.watch``: every number of a record as the scalar ``distcomp/<name>``.

    Takes a directory, in which each rank writes a run of its own (``rank0``, ``rank1``, ...), or a
    ``SummaryWriter`` of yours, which then stays yours to close: give that on one rank only.
    """

    def __init__(self, where: str | Path | Any) -> None:
        self._directory = Path(where) if isinstance(where, str | Path) else None
        self._writer: Any = None if self._directory is not None else where
        if self._directory is not None:
            require("tensorboard", "tensorboard")

    def begin(self, rank: int, size: int) -> None:
        """Where this rank writes; ``handle.watch`` calls it."""
        if self._directory is not None and size > 1:
            self._directory = self._directory / f"rank{rank}"

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
                str(self._directory)
            )
        for name, value in scalars(record).items():
            self._writer.add_scalar(f"distcomp/{name}", value, record["step"])

    def close(self) -> None:
        """Write what waits to be written."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._directory is not None:
            self._writer.close()
