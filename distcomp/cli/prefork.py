"""One warm process per rank: it imports torch and what the script imports once, then forks for each run.

Importing takes seconds of processor time per rank, and seven methods on four ranks would do it 28 times.
A fork takes milliseconds. The forked child has the environment, arguments, directory and output that a fresh
process would have had; only what is imported is there already.
"""

from __future__ import annotations

import ast
import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from distcomp.network import netns


@dataclass(frozen=True)
class RunRequest:
    """What a rank is to run."""

    argv: list[str]
    environment: dict[str, str]
    directory: str
    outputs: tuple[int, int]

    def close(self) -> None:
        """Give the descriptors back."""
        for output in self.outputs:
            os.close(output)


def main(directory: str, script: str) -> None:
    """Import, then fork for each request until killed. Returns only in a forked child."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address(Path(directory), int(os.environ["RANK"])))
    listener.listen()
    for module in imports(Path(script)):
        with suppress(ImportError):  # the script will meet it again, and say where
            importlib.import_module(module)
    threads = len(os.listdir("/proc/self/task")) - 1
    gc.freeze()  # what is here stays here: no child need look through it
    while True:
        connection, _ = listener.accept()
        request = _receive(connection)
        if request is None:
            connection.close()
            continue
        if threads:
            _refuse(request, connection, f"what {script} imports has started {threads} threads")
            continue
        child = os.fork()
        if child == 0:
            listener.close()
            connection.close()
            _become(request)
            return
        request.close()
        _watch(child, connection)


def address(directory: Path, rank: int) -> str:
    """Where the warm process of a rank listens."""
    return str(directory / f"rank{rank}")


def imports(script: Path) -> Iterator[str]:
    """What every rank needs, and what the script's first level imports, except modules that lie beside it."""
    yield from ("torch", "torch.distributed", "torch.nn.parallel", "distcomp")
    try:
        statements = ast.parse(script.read_bytes()).body
    except SyntaxError:  # Python will say so, better, when the script is run
        return
    for node in statements:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
            names = [str(node.module)]
        for name in names:
            root = script.parent / name.partition(".")[0]
            if not root.is_dir() and not root.with_suffix(".py").exists():
                yield name


def run_script() -> None:
    """Run ``sys.argv`` as its own program, in the forked child."""
    script = str(Path(sys.argv[0]).resolve())
    sys.path.insert(0, str(Path(script).parent))
    ending = _Ending(script)
    sys.excepthook = ending.by_exception
    atexit.register(ending.leave)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as request:
        code = request.code
        ending.status = 0 if code is None else code if isinstance(code, int) else 1
        raise


class _Ending:
    """Ends the child once the script's own exit handlers have run.

    Python would now take down every module, object by object: a second of processor time on memory that is
    shared with the warm process, and complaints of libraries that do not like it.
    """

    def __init__(self, script: str) -> None:
        self.status = 0
        self._script = script

    def by_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Print a traceback from the script on, as if nothing had been above it."""
        self.status = 1
        below = trace
        while below is not None and below.tb_frame.f_code.co_filename != self._script:
            below = below.tb_next
        sys.__excepthook__(kind, error.with_traceback(below), below)

    def leave(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self.status & 0xFF)


def _become(request: RunRequest) -> None:
    """Take on everything that a fresh process would have been given."""
    os.setpgid(0, 0)
    netns.die_with_parent(signal.SIGKILL)
    for output, stream in zip(request.outputs, (1, 2), strict=True):
        os.dup2(output, stream)
    request.close()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.directory)
    sys.argv = request.argv
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _receive(connection: socket.socket) -> RunRequest | None:
    """A request with the descriptors of its outputs, or None from a client that was killed."""
    header, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
    body = connection.recv(struct.unpack("=I", header)[0], socket.MSG_WAITALL) if len(header) == 4 else b""
    if not body or len(body) < struct.unpack("=I", header)[0]:
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    told = json.loads(body)
    stdout, stderr = descriptors
    return RunRequest(told["argv"], told["env"], told["cwd"], (stdout, stderr))


def _refuse(request: RunRequest, connection: socket.socket, reason: str) -> None:
    """Tell the rank's own output why its script does not run."""
    os.write(request.outputs[1], f"{reason}, which a fork would lose; use --cold\n".encode())
    request.close()
    with connection:
        connection.sendall(struct.pack("=i", 2))


def _watch(child: int, connection: socket.socket) -> None:
    """Wait for the child and tell its client how it ended; kill it if the client goes first."""
    with connection:
        process = os.pidfd_open(child)
        ended = process in select.select([process, connection.fileno()], [], [])[0]
        os.close(process)
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _end_group(child)
        if ended:
            connection.sendall(struct.pack("=i", status))


def _end_group(leader: int) -> None:
    """What the script left running ends with it."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
    run_script()
