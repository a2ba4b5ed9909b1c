"""MPI moves on only while somebody calls it: one thread calls it for all requests under way.

Waiting inside MPI would spin on a processor for as long as it takes, and could not be given up. So every
request is non-blocking; the thread tests them, more and more seldom while nothing happens, and says when one
is done. A request that is never done is given up by whoever waits for it.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import Any

from distcomp.transports.mpi.library import library

SHORTEST_PAUSE_S = 10e-6
LONGEST_PAUSE_S = 500e-6


class Flight:
    """Requests under way that belong together, their buffers kept alive until MPI is done with them."""

    def __init__(
        self, requests: list[Any], buffers: object, arrived: Callable[[Flight], None] | None
    ) -> None:
        self._requests = requests
        self._buffers = buffers
        self._landed = arrived
        self._done = threading.Event()
        self.error: BaseException | None = None
        self.started_s = time.perf_counter()
        self.finished_s = 0.0

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Raises RuntimeError where MPI reports an error, or nothing in ``timeout_s``."""
        if not self._done.wait(timeout_s):
            raise RuntimeError(f"an MPI request was not done after {timeout_s:g} s")
        if self.error is not None:
            raise RuntimeError(f"MPI: {self.error}") from self.error

    def test(self) -> bool:
        """Whether it is done; the progress thread alone asks."""
        try:
            if not library().Request.Testall(self._requests):
                return False
        except library().Exception as error:
            self.error = error
        self.finished_s = time.perf_counter()
        try:
            if self._landed is not None:
                self._landed(self)
        except BaseException as error:
            self.error = self.error or error
        self._buffers = None
        self._done.set()
        return True


class ProgressThread:
    """The thread, one for the process. It sleeps while nothing is under way."""

    def __init__(self) -> None:
        self._flights: list[Flight] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="distcomp-mpi", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def add(self, flight: Flight) -> Flight:
        with self._changed:
            self._flights.append(flight)
            self._changed.notify()
        return flight

    def stop(self) -> None:
        """Before MPI is finalized. What is under way for ever cannot be: then the job is aborted."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        if self._flights and not library().Is_finalized():
            library().COMM_WORLD.Abort(1)

    def _run(self) -> None:
        pause_s = SHORTEST_PAUSE_S
        while self._some():
            under_way = list(self._flights)
            arrived = {id(flight) for flight in under_way if flight.test()}
            if arrived:
                with self._changed:
                    self._flights = [flight for flight in self._flights if id(flight) not in arrived]
                pause_s = SHORTEST_PAUSE_S
                continue
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)

    def _some(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._flights or self._stopped)
            return not self._stopped


_STARTING = threading.Lock()
_PROGRESS: list[ProgressThread] = []


def take_off(requests: list[Any], buffers: object, arrived: Callable[[Flight], None] | None = None) -> Flight:
    """Watch requests that have just been posted. ``arrived`` is called on the thread when all are done."""
    with _STARTING:
        if not _PROGRESS:
            _PROGRESS.append(ProgressThread())
    return _PROGRESS[0].add(Flight(requests, buffers, arrived))
