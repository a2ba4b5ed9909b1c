"""The record of a run: a directory of plain text that grows line by line, so that a kill loses nothing.

``run.json`` says what was run, where and on which network; the launcher writes it, or rank 0 where there is
no launcher. Each rank appends to its own ``rank{r}.jsonl``, one JSON object a line, of three kinds::

    {"kind": "note", "seed": 0, "steps": 300}        # what only the script knows; later notes add to earlier
    {"kind": "step", "step": 7, "step_s": 0.41, "exchange_s": 0.33, "wire_idle_s": 0.02,
     "phases": {"encode_s": .., "recode_s": .., "wait_s": .., "decode_s": ..},
     "exposed": {..},                                # of the phases, what no computation hid
     "payload_bytes": 524288, "payload_by_kind": {"codes": .., "scales": ..},
     "predicted_wire_bytes": 548231,
     "qdisc_bytes": 81234567}                        # counted by the kernel since the link was made, or null
    {"kind": "metric", "step": 7, "train_s": 3.1, "test_loss": 1.2, "test_accuracy": 0.61}

A run that was resumed repeats steps; the later lines stand.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from distcomp.errors import DistcompError
from distcomp.version import __version__

RUN_DIR = "DISTCOMP_RUN_DIR"
METHOD = "DISTCOMP_METHOD"
FORMAT = 1
KINDS = ("note", "step", "metric")

Record = Mapping[str, Any]


class Recorder:
    """Appends to one rank's file. One system call per line: what was recorded survives the process."""

    def __init__(self, directory: Path, rank: int) -> None:
        path = directory / f"rank{rank}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        _drop_torn_tail(self._file)

    @classmethod
    def from_env(cls, rank: int) -> Recorder | None:
        """The recorder into ``DISTCOMP_RUN_DIR``, or None where that is not set.

        Raises DistcompError where the directory cannot be written.
        """
        name = os.environ.get(RUN_DIR)
        if not name:
            return None
        directory = Path(name)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if rank == 0 and not (directory / "run.json").exists():
                write_about(directory, surroundings(Path.cwd()) | {"method": os.environ.get(METHOD)})
            return cls(directory, rank)
        except OSError as error:
            raise DistcompError(
                f"{RUN_DIR}={name} cannot be written ({error}); name one you may write to, or unset it"
            ) from None

    def step(self, **fields: Any) -> None:
        """What one step took and sent."""
        self._append("step", fields)

    def metric(self, **fields: Any) -> None:
        """What an evaluation found; ``train_s`` is the time spent training so far, evaluations left out."""
        self._append("metric", fields)

    def note(self, **fields: Any) -> None:
        """What only the script knows of the run: ``seed``, how many ``steps`` it will take."""
        self._append("note", fields)

    def close(self) -> None:
        """Give the file back. Nothing waits to be written."""
        os.close(self._file)

    def _append(self, kind: str, fields: Record) -> None:
        line = json.dumps({"kind": kind, **fields}, default=_plain)
        os.write(self._file, line.encode() + b"\n")


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers by name, nested ones as ``phases/encode_s``; without its ``kind`` and ``step``."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": one for inner, one in scalars(value).items()}
        elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


@dataclass(frozen=True)
class Run:
    """A run as it was recorded.

    ``about`` is run.json and the notes of rank 0, ``ranks`` each rank's steps and metrics in order.
    """

    directory: Path
    about: Record
    ranks: Mapping[int, tuple[Record, ...]]

    @property
    def method(self) -> str:
        """The method as it was asked for."""
        return str(self.about.get("method") or "unknown")

    def of_kind(self, kind: str, rank: int = 0) -> list[Record]:
        """One rank's ``step`` or ``metric`` records."""
        return [record for record in self.ranks.get(rank, ()) if record["kind"] == kind]


def write_about(directory: Path, about: Record) -> None:
    """Write run.json whole or not at all."""
    partial = directory / f".run.json.{os.getpid()}"
    partial.write_text(
        json.dumps({"format": FORMAT, **about}, indent=2, default=_plain) + "\n", encoding="utf-8"
    )
    partial.replace(directory / "run.json")


def surroundings(where: Path) -> dict[str, Any]:
    """The host, the versions, the time, and the git commit of ``where`` (with + if there are changes)."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": _version("torch"),
            "distcomp": __version__,
        },
        "commit": _commit(where),
    }


def find(paths: list[Path]) -> list[Path]:
    """The run directories among ``paths`` and one level below them, in order of name.

    Raises DistcompError for a path that is no run and holds none.
    """
    found: list[Path] = []
    for path in paths:
        runs = (
            [path]
            if (path / "run.json").is_file()
            else sorted(about.parent for about in path.glob("*/run.json"))
        )
        if not runs:
            raise DistcompError(f"{path} holds no run; name a directory with a run.json in it, or its parent")
        found += [run for run in runs if run not in found]
    return found


def read(directory: Path) -> Run:
    """Read a run, also one that is still running or was killed in the middle of a line.

    Raises DistcompError where the directory is not a run, or a line before the last is damaged.
    """
    try:
        about = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        version = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistcompError(
            f"{directory} is not the record of a run ({error}); name a directory made by distcomp"
        ) from None
    if version != FORMAT:
        raise DistcompError(
            f"{directory} is in format {version}, this distcomp reads {FORMAT}; use the version that wrote it"
        )
    ranks: dict[int, tuple[Record, ...]] = {}
    for path in directory.glob("rank*.jsonl"):
        number = path.stem.removeprefix("rank")
        if number.isdecimal():
            ranks[int(number)] = tuple(read_lines(path))
    for note in ranks.get(0, ()):
        if note["kind"] == "note":
            about |= {key: value for key, value in note.items() if key != "kind"}
    return Run(directory, about, {rank: _latest(ranks[rank]) for rank in sorted(ranks)})


def read_lines(path: Path) -> Iterator[Record]:
    """The records of one rank's file. What follows the last newline was never finished and is left out."""
    *whole, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            if record["kind"] not in KINDS:
                raise ValueError(f"unknown kind {record['kind']!r}")
            if record["kind"] != "note" and not isinstance(record["step"], int):
                raise ValueError(f"the step {record['step']!r} is not a whole number")
        except (ValueError, KeyError, TypeError) as error:
            raise DistcompError(
                f"line {number} of {path} is damaged ({error}); remove that line to read the rest"
            ) from None
        yield record


def _latest(records: Iterable[Record]) -> tuple[Record, ...]:
    """Steps and metrics; a resumed run goes back, and what it repeats replaces what it had done before."""
    kept: list[Record] = []
    for record in records:
        if record["kind"] == "note":
            continue
        kind, step = record["kind"], record["step"]
        if kind == "metric" and kept and (kept[-1]["kind"], kept[-1]["step"]) == (kind, step):
            kept[-1] = {**kept[-1], **record}  # told in two halves
            continue
        last = next((old["step"] for old in reversed(kept) if old["kind"] == kind), -math.inf)
        if last >= step:
            del kept[next(i for i, old in enumerate(kept) if old["kind"] == kind and old["step"] >= step) :]
        kept.append(record)
    return tuple(kept)


def _drop_torn_tail(file: int) -> None:
    """Cut what a killed run left after its last newline, so that the next line starts on its own."""
    size = os.fstat(file).st_size
    kept, step = size, 4096
    while kept > 0:
        start = max(0, kept - step)
        newline = os.pread(file, kept - start, start).rfind(b"\n")
        kept = start if newline < 0 else start + newline + 1
        if newline >= 0:
            break
    if kept < size:
        os.ftruncate(file, kept)


def _plain(value: object) -> object:
    """A tensor or array of one number as that number."""
    item = getattr(value, "item", None)
    if item is None:
        raise DistcompError(f"a {type(value).__name__} cannot be recorded; log numbers and text")
    return item()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit(where: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(where), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
