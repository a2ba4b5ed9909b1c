"""The connection with one neighbour, over which both send at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

FOREVER = timedelta(days=365)
"""Gloo closes a connection whose wait times out: how long one waits is decided elsewhere."""


class NeighbourConnection:
    """The connection with one neighbour, who is ``other`` of two."""

    def __init__(self, group: Any, other: int) -> None:
        self._group = group
        self._other = other
        self._waiting: threading.Thread | None = None

    def exchange(self, wire: Tensor, size: int) -> tuple[Future[None], Tensor]:
        """Send ``wire``, and receive as many bytes as ``size``: done when the future is."""
        received = torch.empty(size, dtype=torch.uint8)
        works = [self._group.recv([received], self._other, 0), self._group.send([wire], self._other, 0)]
        done: Future[None] = Future()

        def wait() -> None:
            try:
                for work in works:
                    work.wait(FOREVER)
            except RuntimeError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._waiting = threading.Thread(target=wait, name="distcomp-edge", daemon=True)
        self._waiting.start()
        return done, received

    def close(self) -> None:
        """Close the connection where something is under way: whoever waits at either end is told.

        Gloo has no call for it, and closes a connection when a wait on it times out: so one does.
        """
        if self._waiting is None or not self._waiting.is_alive():
            return
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._other, 1).wait(
                timedelta(milliseconds=1)
            )
        self._waiting.join()
