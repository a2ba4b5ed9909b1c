"""Calls that have no timeout of their own, given one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from distcomp.errors import PeerLost

Result = TypeVar("Result")


STORE_SILENT = (
    "the rendezvous store does not answer: the process that hosts it (rank 0, or the launcher's agent) is "
    "stopped or cut off; restart from the last checkpoint"
)


STORE_S = 20.0
"""So long the rendezvous store may take for one answer.

Its host looks up the name of whoever connects, and answers nobody meanwhile; where the name server is silent,
that takes the resolver's five seconds twice, for each name server.
"""


def ask_store(call: Callable[[], Result]) -> Result:
    """What a call of the rendezvous store's returns. Raises PeerLost where it is gone, or does not answer."""
    try:
        return bounded(call, STORE_S, STORE_SILENT)
    except RuntimeError as error:
        raise PeerLost(f"{STORE_SILENT} ({str(error).splitlines()[0][:200]})") from error


def bounded(call: Callable[[], Result], patience_s: float, sentence: str) -> Result:
    """What ``call`` returns or raises. Raises PeerLost with ``sentence`` where it does neither in time.

    A store's client waits for an answer for as long as its host's socket is open, which a stopped process's
    is. Nothing can interrupt it: it is left behind, on a thread that ends when the host does.
    """
    answers: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="distcomp-bounded", daemon=True)
    thread.start()
    thread.join(max(0.01, patience_s))
    if thread.is_alive():
        raise PeerLost(sentence)
    if errors:
        raise errors[0]
    return answers[0]
