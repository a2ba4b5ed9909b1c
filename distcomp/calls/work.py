"""A call under way, as torch.distributed's ``Work``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Work:
    """``wait()`` blocks until the call is over, and writes what came into the output."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Returns when the output is there.

        Raises PeerLost naming a rank that is lost or does not call, Mismatch where ranks call differently;
        every time it is asked.
        """
        if self._error is not None:
            raise self._error
        if self._finish is None:
            return
        finish, self._finish = self._finish, None
        try:
            finish()
        except BaseException as error:
            self._error = error
            raise
