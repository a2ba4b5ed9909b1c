"""One program per rank, watched until all have ended: who failed, what did each say, and never a hang."""

from __future__ import annotations

import math
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import IO, TextIO

from distcomp.errors import DistcompError
from distcomp.network import control_socket

MEMORY_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Tells glibc to keep what is freed. Otherwise it gives each step's buffers back to the kernel and takes them
again page by page, zeroed each time."""

_TAIL_BYTES = 1 << 20
_TAIL_LINES = 40
_CHUNK_BYTES = 1 << 16
_DRAIN_S = 5.0
_KILL_S = 30.0

Show = Callable[[int, str, bytes], None]
"""Called with (rank, "stdout" or "stderr", bytes) for all that a rank writes, as it comes."""


@dataclass(frozen=True)
class Command:
    """What to run on a host: the program's argv, and its whole environment."""

    argv: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class LaunchResult:
    """How a launch ended. Exit codes are as in `subprocess`: below zero is the signal that killed it."""

    exit_codes: dict[int, int]
    outputs: dict[int, str]
    """The last megabyte each rank wrote, stdout and stderr together."""
    first_failure: int | None
    """The rank that was the first to fail by itself, or None."""
    stopped: frozenset[int]
    """Ranks that were killed here, because another had failed or the time was up."""
    timed_out: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """Did every rank end with status 0?"""
        return not any(self.exit_codes.values())


def show_rank_0(rank: int, stream: str, data: bytes) -> None:
    """Pass on what rank 0 writes, and nobody else."""
    if rank == 0:
        _write(sys.stdout if stream == "stdout" else sys.stderr, data)


def show_nothing(rank: int, stream: str, data: bytes) -> None:
    """Keep it quiet; :attr:`LaunchResult.outputs` has it."""


@dataclass
class _Program:
    rank: int
    pid: int
    envelope: socket.socket
    pipes: Sequence[IO[bytes]]
    exit_code: int | None = None
    tail: bytearray = field(default_factory=bytearray)


class Job:
    """Programs that run on hosts of an emulated network. Nobody reads their output before :meth:`wait`."""

    def __init__(self, control: socket.socket, commands: Mapping[int, Command]) -> None:
        self._selector = selectors.DefaultSelector()
        self._programs: dict[int, _Program] = {}
        self._started_s = time.monotonic()
        self._failed_s = math.inf
        self._first_failure: int | None = None
        self._stopped: frozenset[int] = frozenset()
        try:
            for rank, command in commands.items():
                self._programs[rank] = self._start(control, rank, command)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: program.pid for rank, program in self._programs.items()}

    def kill(self, rank: int) -> None:
        """Kill a rank's program and all that it started (SIGKILL)."""
        program = self._programs[rank]
        if program.exit_code is None:
            program.envelope.shutdown(socket.SHUT_WR)

    def wait(
        self, timeout_s: float = math.inf, grace_s: float = 20.0, show: Show = show_rank_0
    ) -> LaunchResult:
        """Watch until all programs have ended, and say how.

        When one fails, the others get `grace_s` to notice by themselves; those that do not are killed, as is
        everybody `timeout_s` after the start. With :func:`show_rank_0`, what other failing ranks wrote last
        goes to stderr at the end, each line with its rank.
        """
        with closing(self):
            while running := self._running():
                deadline_s = min(self._started_s + timeout_s, self._failed_s + grace_s)
                if not self._stopped and time.monotonic() >= deadline_s:
                    self._stop(running)
                self._pump(deadline_s, show)
            self._drain(show)
        result = self._outcome()
        if show is show_rank_0:
            _show_failures(result)
        return result

    def close(self) -> None:
        """Kill what still runs. Afterwards nothing can be read any more."""
        for program in self._programs.values():
            program.envelope.close()
            for pipe in program.pipes:
                pipe.close()
        self._selector.close()

    def _start(self, control: socket.socket, rank: int, command: Command) -> _Program:
        message = {"ask": "start", "host": rank, "argv": list(command.argv), "cwd": os.getcwd()}
        message["env"] = dict(command.environment)
        with ExitStack() as undo:
            readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
            pipes = [undo.enter_context(os.fdopen(reader, "rb", buffering=0)) for reader in readers]
            try:
                envelope = undo.enter_context(control_socket.post(control, message, writers))
            finally:
                for writer in writers:
                    os.close(writer)
            pid = int(control_socket.answer(envelope)["pid"])
            undo.pop_all()
        program = _Program(rank, pid, envelope, pipes)
        self._selector.register(envelope, selectors.EVENT_READ, lambda show: self._ended(program))
        for name, reader in zip(("stdout", "stderr"), pipes, strict=True):
            self._selector.register(reader, selectors.EVENT_READ, self._reading(program, name, reader))
        return program

    def _reading(self, program: _Program, name: str, reader: IO[bytes]) -> Callable[[Show], None]:
        def read(show: Show) -> None:
            data = reader.read(_CHUNK_BYTES)
            if not data:
                self._selector.unregister(reader)
                return
            program.tail += data
            del program.tail[:-_TAIL_BYTES]
            show(program.rank, name, data)

        return read

    def _ended(self, program: _Program) -> None:
        self._selector.unregister(program.envelope)
        program.exit_code = int(control_socket.answer(program.envelope)["exit"])
        if program.exit_code != 0 and self._first_failure is None and not self._stopped:
            self._first_failure, self._failed_s = program.rank, time.monotonic()

    def _running(self) -> frozenset[int]:
        return frozenset(rank for rank, program in self._programs.items() if program.exit_code is None)

    def _stop(self, running: frozenset[int]) -> None:
        self._stopped = running
        for rank in running:
            self.kill(rank)

    def _pump(self, deadline_s: float, show: Show) -> None:
        """Serve what has come in; wait for it until the deadline, or for a kill to take effect."""
        wait_s = _KILL_S if self._stopped else max(0.0, deadline_s - time.monotonic())
        ready = self._selector.select(None if wait_s == math.inf else wait_s)
        if self._stopped and not ready:
            names = ", ".join(map(str, sorted(self._running())))
            raise DistcompError(
                f"rank {names} survived SIGKILL for {_KILL_S:g} s; see with ps what it waits for"
            )
        for key, _ in ready:
            key.data(show)

    def _drain(self, show: Show) -> None:
        """All have ended: read what is left in their pipes."""
        deadline_s = time.monotonic() + _DRAIN_S
        while self._selector.get_map() and time.monotonic() < deadline_s:
            for key, _ in self._selector.select(deadline_s - time.monotonic()):
                key.data(show)

    def _outcome(self) -> LaunchResult:
        programs = self._programs.values()
        return LaunchResult(
            exit_codes={program.rank: int(program.exit_code or 0) for program in programs},
            outputs={program.rank: program.tail.decode(errors="replace") for program in programs},
            first_failure=self._first_failure,
            stopped=self._stopped,
            timed_out=bool(self._stopped) and self._first_failure is None,
            seconds=time.monotonic() - self._started_s,
        )


def _show_failures(result: LaunchResult) -> None:
    for rank, code in sorted(result.exit_codes.items()):
        if rank != 0 and code != 0 and rank not in result.stopped:
            lines = result.outputs[rank].splitlines()[-_TAIL_LINES:]
            text = "".join(
                f"[rank {rank}] {line}\n" for line in [*lines, f"ended with {describe_exit(code)}"]
            )
            _write(sys.stderr, text.encode())


def describe_exit(exit_code: int) -> str:
    """``"status 1"``, or ``"SIGKILL"`` where a signal ended it."""
    return f"status {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name


def _write(stream: TextIO, data: bytes) -> None:
    if hasattr(stream, "buffer"):
        stream.flush()
        stream.buffer.write(data)
    else:
        stream.write(data.decode(errors="replace"))
    stream.flush()
