"""Real processes for tests: ranks that stay up, import torch once, and run one job after another over Gloo on
loopback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

PATIENCE_S = 120.0
"""After this a job counts as hung. Far above what any job takes: it is a verdict, not a measurement."""


_EARLIER: set[threading.Thread] = set()
"""The threads of this rank before its job: an earlier one may have ended attached and be collected later."""


def threads_left() -> list[str]:
    """What still runs of distcomp's in this rank, of what its job has started."""
    started = (thread for thread in threading.enumerate() if thread not in _EARLIER)
    return [thread.name for thread in started if thread.name.startswith("distcomp")]


def warm_processes() -> ForkServerContext:
    """Processes that are forked from one that has imported torch, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


class JobFailed(AssertionError):
    """A job raised; the message holds the rank and its traceback."""


class Cluster:
    """``size`` processes. ``run(job, *arguments)`` calls ``job(rank, size, *arguments)`` on each and returns
    the answers."""

    def __init__(self, size: int, patience_s: float = PATIENCE_S) -> None:
        self.size = size
        self.patience_s = patience_s
        context = warm_processes()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The ranks' answers, in rank order. Raises JobFailed, with every failed rank's words, if any rank
        raised, died or hung."""
        answers = self.results(job, *arguments)
        failed = _told(answers)
        if failed:
            self.close()
            raise JobFailed(failed)
        return answers

    def results(self, job: Callable[..., Any], *arguments: Any, without: int | None = None) -> list[Any]:
        """As :meth:`run`, but a rank that raised or died gives a Failure; nobody waits for rank
        ``without``."""
        self.pipes[0].send((job, arguments, 0))
        port = self._port()
        for pipe in self.pipes[1:]:
            pipe.send((job, arguments, port))
        answers: list[Any] = [Failure("hung")] * self.size
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank != without}
        while waiting:
            ready = wait(list(waiting), self.patience_s)
            if not ready:
                self.close()
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = Failure("died")
        return answers

    def _port(self) -> int | None:
        """Where rank 0 listens, on a port that was free and is its own from then on; None if it is gone."""
        if not self.pipes[0].poll(self.patience_s):
            return None
        try:
            port: int = self.pipes[0].recv()
        except (EOFError, ConnectionResetError):
            return None
        return port

    @property
    def usable(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                with suppress(ProcessLookupError):  # it has just died by itself
                    os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


class Failure:
    """What a rank has instead of an answer."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Failure({self.text!r})"


def _told(answers: list[Any]) -> str:
    """The failures among the answers, by rank."""
    return "\n".join(
        f"rank {rank}: {one.text}" for rank, one in enumerate(answers) if isinstance(one, Failure)
    )


def _serve(rank: int, size: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job, arguments, port = pipe.recv()
        except EOFError:
            return
        # A rank that cannot meet the others dies of it: what rank 0 sends first is a port.
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
        if rank == 0:
            pipe.send(store.port)
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), RANK=str(rank), WORLD_SIZE=str(size)
        )
        _EARLIER.clear()
        _EARLIER.update(threading.enumerate())
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            answer = job(rank, size, *arguments)
        except BaseException as error:
            answer = Failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
