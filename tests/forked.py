"""A program in a process of its own that has imported torch already: forked, where a new interpreter would
import for seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.cluster import warm_processes


@dataclass(frozen=True)
class Done:
    """How a program ended: its exit status, and what it wrote to standard output and standard error."""

    returncode: int
    stdout: str
    stderr: str


def run(program: str, where: Path, env: Mapping[str, str], timeout_s: float = 240.0) -> Done:
    """Run the text of a program as ``python -c`` would, in the folder ``where`` and with these variables."""
    files = [where / f".{name}" for name in ("stdout", "stderr")]
    process = warm_processes().Process(target=_become, args=(program, where, dict(env), files))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Done(process.exitcode, *(file.read_text() if file.exists() else "" for file in files))


def _become(program: str, where: Path, env: dict[str, str], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(where)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c"]
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), main.__dict__)
