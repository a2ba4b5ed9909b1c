"""A command whose standard output is a terminal of so many columns, or a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(
    command: Sequence[str], columns: int, terminal: bool, where: Path, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The status of a command and what its standard output got: on a terminal of so many columns, or in a
    pipe, of which the environment says the same."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | dict(env or {})
    if not terminal:
        done = subprocess.run(
            command, cwd=where, env=environment | {"COLUMNS": str(columns)}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command, cwd=where, env=environment | {"TERM": "xterm-256color"}, stdin=theirs, stdout=theirs,
        stderr=subprocess.DEVNULL, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    pieces = []
    try:
        while piece := os.read(ours, 1 << 16):
            pieces.append(piece)
    except OSError:  # what a terminal says once nobody holds its other side
        pass
    os.close(ours)
    return process.wait(timeout=300), b"".join(pieces).decode().replace("\r\n", "\n")


def faults(text: str, columns: int, terminal: bool, names: Sequence[str]) -> list[str]:
    """What is wrong with a table: a name that is cut or broken, a line wider than the terminal (but for a
    name that is), control characters in a pipe."""
    plain = CONTROL.sub("", text) if terminal else text
    lines = plain.splitlines()
    found = [f"{name} is not on one line" for name in names if not any(name in line for line in lines)]
    if terminal:
        found += [
            f"wider than {columns}: {line}" for line in lines if len(line) > columns and line not in names
        ]
    return found + (["control characters in a pipe"] if "\x1b" in plain else [])
