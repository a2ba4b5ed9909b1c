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

    Takes a directory, or a ``SummaryWriter`` of your own, which then stays yours to close.
    """

    def __init__(self, where: str | Path | Any) -> None:
        self._own = isinstance(where, str | Path)
        if self._own:
            require("tensorboard", "tensorboard")
            where = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(where))
        self._writer: Any = where

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(f"distcomp/{name}", value, record["step"])

    def close(self) -> None:
        """Write what waits to be written."""
        self._writer.flush()
        if self._own:
            self._writer.close()
