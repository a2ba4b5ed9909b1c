"""What a process waits for before it ends: threads that carried its exchanges, and free what they carried."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 5.0
"""So long the end of a process waits; a thread may be at work for a peer that never comes."""

LOOK_S = 0.002
"""Between two looks; who waited for the interpreter's lock has it meanwhile."""

_GLOO = "pt_gloo_runloop"
_OURS = "distcomp-"
_LOOKED_AT = "State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"


def wait_for_threads() -> None:
    """Wait until no thread of Gloo's process groups, and none of ours, is at work; at most ``PATIENCE_S``.

    A thread that completes a collective first wakes who waits for it, and then lets go of its tensors and
    callbacks, for which it needs the interpreter's lock. An interpreter that is ending meanwhile ends whoever
    asks for that lock, and a thread that is ended inside C++ aborts the process ("terminate called without an
    active exception"), after everything the script did. PyTorch joins such threads when the last reference to
    a process group goes; a DDP model holds one until the interpreter is gone.

    Looks into ``/proc``; elsewhere than on Linux it does nothing.
    """
    until_s = time.monotonic() + PATIENCE_S
    before = _at_work()
    while before and time.monotonic() < until_s:
        threading.Event().wait(LOOK_S)  # lets go of the interpreter's lock: whoever waits for it goes on
        now = _at_work()
        if now == before and not any(state.startswith("R") for state, *_ in now.values()):
            return
        before = now


def _at_work() -> dict[int, tuple[str, ...]]:
    """Of each thread its state, and how often it has slept: who sleeps and has not woken since is idle."""
    ours = {one.native_id for one in threading.enumerate() if one.name.startswith(_OURS)}
    seen: dict[int, tuple[str, ...]] = {}
    for path in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # it has ended
            lines = (line.partition(":\t") for line in path.read_text().splitlines())
            status = {name: value for name, _, value in lines}
            thread = int(path.parent.name)
            if status.get("Name") == _GLOO or thread in ours:
                seen[thread] = tuple(status.get(name, "") for name in _LOOKED_AT)  # sandboxes tell less
    return seen
