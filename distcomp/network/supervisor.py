"""The process that owns an emulated network and starts programs on its hosts.

It holds the only descriptors of the namespaces, and it is the parent of everything that runs there. When the
emulator closes its end or dies, by whatever signal, the holder kills all its descendants and ends; should the
holder itself be killed, the kernel kills the programs (PDEATHSIG). Either way the kernel then removes the
network.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distcomp.errors import DistcompError
from distcomp.network import control_socket, netns, qdisc, shape
from distcomp.network.fabric import Fabric

_LOOK_UP_S = 1.0
_KILL_S = 10.0


def main(control: str) -> None:
    """Serve the requests that come over the inherited socket `control` until its other end is gone."""
    Holder(socket.socket(fileno=int(control))).serve()


class Holder:
    """Hosts, the programs that run on them, and the loop that watches both."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._hosts: list[shape.EmulatedHost] = []
        self._running: dict[int, tuple[subprocess.Popen[bytes], socket.socket]] = {}
        self._selector = selectors.DefaultSelector()
        self._parent = os.getppid()
        self._wanted = True
        self._folders: list[str] = []

    def serve(self) -> None:
        """Answer until the emulator is gone, then leave nothing behind."""
        netns.adopt_orphans()
        self._selector.register(self._control, selectors.EVENT_READ, self._answer)
        self._selector.register(_child_alarm(), selectors.EVENT_READ, self._reap)
        try:
            while self._wanted and os.getppid() == self._parent:
                for key, _ in self._selector.select(_LOOK_UP_S):
                    key.data(key.fileobj)
        finally:
            _kill(os.getpid())
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _answer(self, control: socket.socket) -> None:
        letter = control_socket.collect(control)
        if letter is None:
            self._wanted = False
            return
        envelope, message, descriptors = letter
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "build": self._build,
            "link": self._link,
            "count": self._count,
            "folder": self._folder,
        }
        try:
            if message["ask"] == "start":
                self._start(envelope, message, descriptors)
            else:
                control_socket.send_message(envelope, answers[message["ask"]](message))
        except netns.Refused as error:
            control_socket.send_message(envelope, {"refused": str(error)})
        except DistcompError as error:
            control_socket.send_message(envelope, {"error": str(error)})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _build(self, message: dict[str, Any]) -> dict[str, Any]:
        fabric = Fabric.parse(message["fabric"])
        rootless = netns.isolate(message["rootless"])
        netem = shape.has_netem() if message["delays"] else False
        self._hosts = shape.build(fabric, netem)
        return {"rootless": rootless, "netem": netem, "addresses": [host.address for host in self._hosts]}

    def _link(self, message: dict[str, Any]) -> dict[str, Any]:
        shape.set_link(self._hosts[message["host"]].plug, message["up"])
        return {}

    def _folder(self, message: dict[str, Any]) -> dict[str, Any]:
        """A temporary folder that goes with the network, however the emulator ends."""
        self._folders.append(tempfile.mkdtemp(prefix="distcomp-"))
        return {"folder": self._folders[-1]}

    def _count(self, message: dict[str, Any]) -> dict[str, Any]:
        counts = []
        for host in self._hosts:
            with netns.inside(host.namespace):
                sent, retransmitted = qdisc.read_qdisc(shape.DEVICE), shape.retransmitted_segments()
            received = qdisc.read_qdisc(host.plug)
            queues = {"sent": asdict(sent), "received": asdict(received)}
            counts.append({**queues, "retransmitted": retransmitted})
        return {"counts": counts}

    def _start(self, envelope: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
        """Run a program on a host. Its envelope later brings the exit status; half-closing it is a kill."""
        namespace = self._hosts[message["host"]].namespace if self._hosts else None

        def prepare() -> None:
            netns.die_with_parent(signal.SIGKILL)
            if namespace is not None:
                netns.enter(namespace)

        stdout, stderr = descriptors
        try:
            program = subprocess.Popen(
                message["argv"], env=message["env"], cwd=message["cwd"], preexec_fn=prepare,
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            remedy = "give a program that exists and may be executed"
            raise DistcompError(f"{message['argv'][0]!r} cannot be started ({error}); {remedy}") from error
        self._running[program.pid] = program, envelope
        control_socket.send_message(envelope, {"pid": program.pid})
        self._selector.register(envelope, selectors.EVENT_READ, lambda _: self._stop(program.pid))

    def _stop(self, pid: int) -> None:
        if pid in self._running:  # else it has ended in this very moment
            self._selector.unregister(self._running[pid][1])
            _kill_all([pid, *descendants(pid)])

    def _reap(self, alarm: socket.socket) -> None:
        """Report who has ended. Once nobody is left, whatever they left running ends too."""
        alarm.recv(4096)
        ended = []
        for pid, status in _zombies():
            if pid in self._running:
                program, envelope = self._running.pop(pid)
                program.returncode = os.waitstatus_to_exitcode(status)
                ended.append((envelope, program.returncode))
        if not self._running:
            _kill(os.getpid())
        for envelope, code in ended:
            if envelope in self._selector.get_map():
                self._selector.unregister(envelope)
            with envelope, contextlib.suppress(ConnectionError):  # whoever asked may be gone
                control_socket.send_message(envelope, {"exit": code})


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended while we looked
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry.name))
    below: list[int] = []
    layer = children.get(pid, [])
    while layer:
        below += layer
        layer = [child for parent in layer for child in children.get(parent, [])]
    return below


def _kill(root: int) -> None:
    """Kill everything below `root`, and what that starts meanwhile, until nothing is left."""
    deadline = time.monotonic() + _KILL_S
    while (pids := descendants(root)) and time.monotonic() < deadline:
        _kill_all(pids)
        time.sleep(0.005)


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # already gone, or no longer ours (a set-user-id program)


def _zombies() -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def _child_alarm() -> socket.socket:
    """A socket that becomes readable when a child has ended."""
    listen, ring = socket.socketpair()
    for end in (listen, ring):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ring.detach(), warn_on_full_buffer=False)
    return listen
