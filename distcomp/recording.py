"""The record of a run: a directory of plain text that grows line by line, so that a kill loses nothing.

``run.json`` says what was run, where and on which network; the launcher writes it, or rank 0 where there is
no launcher. Each rank appends to its own ``rank{r}.jsonl``, one JSON object a line, of four kinds::

    {"kind": "note", "seed": 0, "steps": 300,        # what only the script knows; later notes add to earlier
     "method": "qsgd:bits=4",                        # what attach put in place, whatever was asked for
     "method_from": "environment"}                   # or "script", where the script names the method itself
    {"kind": "step", "step": 7, "step_s": 0.41, "exchange_s": 0.33,
     "phases": {"encode_s": .., "recode_s": .., "wait_s": .., "decode_s": ..},
     "exposed": {..},                                # of the phases, what no computation hid
     "payload_bytes": 524288, "payload_by_kind": {"codes": .., "scales": ..},   # of this step
     "predicted_wire_bytes": 548231,
     "qdisc_bytes": 81234567}                        # counted by the kernel since the link was made, or null
    {"kind": "detail", "step": 50,                   # every DISTCOMP_DETAIL_EVERY steps, where that is set
     "memory": {"peak_bytes": .., "state_bytes": ..},
     "parameters": {"fc.weight": {"numel": .., "payload_bytes": .., "gradient_norm": .., "residual_norm": ..,
                                  "error": ..}},     # rank 0, gradient methods under DDP
     "spans": [["encode", 0, 0, 0.0, 0.01]], "ready_s": 0.02}  # phase, bucket, round, begin, end; rank 0
    {"kind": "metric", "step": 7, "train_s": 3.1, "test_loss": 1.2, "test_accuracy": 0.61}

A run that was resumed repeats steps; the later lines stand.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from distcomp.atomic_write import write_whole
from distcomp.errors import DistcompError
from distcomp.version import __version__

RUN_DIR = "DISTCOMP_RUN_DIR"
METHOD = "DISTCOMP_METHOD"
DETAIL_EVERY = "DISTCOMP_DETAIL_EVERY"
FORMAT = 1
KINDS = ("note", "step", "detail", "metric")
COUNTED = ("step_s", "exchange_s", "payload_bytes", "predicted_wire_bytes", "qdisc_bytes")
"""What the record of a step counts: numbers of zero or more, or null."""
DETAILED = ("numel", "payload_bytes", "gradient_norm", "residual_norm", "error")
"""What a closer look counts of a parameter."""
GROUPED = ("phases", "exposed", "payload_by_kind")
LARGEST = 1e30
"""A number beyond this is none that was measured; it counts as infinite."""

Record = Mapping[str, Any]


class Recorder:
    """Appends to one rank's file. One system call per line: what was recorded survives the process.

    A record that cannot be written (a full disk) stops no training: the recorder warns once and is silent.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / f"rank{rank}.jsonl"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._broken = False
        try:
            _drop_torn_tail(self._file)
        except OSError as error:
            self._give_up(error)

    @classmethod
    def from_env(cls, rank: int) -> Recorder | None:
        """The recorder into ``DISTCOMP_RUN_DIR``, or None where that is not set, or cannot be written: then
        with a warning that says so."""
        name = os.environ.get(RUN_DIR)
        if not name:
            return None
        directory = Path(name)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if rank == 0 and not (directory / "run.json").exists():
                write_about(directory, surroundings(Path.cwd()) | {"asked": os.environ.get(METHOD)})
            return cls(directory, rank)
        except OSError as error:
            _warn(f"{RUN_DIR}={name} cannot be written ({error})")
            return None

    def step(self, **fields: Any) -> None:
        """What one step took and sent."""
        self._append("step", fields)

    def detail(self, **fields: Any) -> None:
        """A closer look at one step."""
        self._append("detail", fields)

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
        line = json.dumps({"kind": kind, **fields}, default=_plain).encode() + b"\n"
        if self._broken:
            return
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.write(self._file, line[written:])  # says why the rest has no place
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """What is torn now is cut when the record is read; nothing may come after it."""
        self._broken = True
        _warn(f"{self._path} cannot be written ({error})")


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}; training goes on and is not recorded any more: make room there, or name another directory",
        stacklevel=4,
    )


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers by name, nested ones as ``phases/encode_s``; without its ``kind`` and ``step``."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{inner}": number for inner, number in scalars(value).items()}
        elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            numbers[name] = value
    return numbers


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
        """The method that was attached; where none was, what was asked for, said to be no more than that."""
        method, asked = self.about.get("method"), self.about.get("asked")
        return method or (f"{asked} (never attached)" if asked else "unknown")

    @property
    def asked(self) -> str | None:
        """The method that the launcher asked for."""
        return self.about.get("asked")

    def of_kind(self, kind: str, rank: int = 0) -> list[Record]:
        """One rank's ``step`` or ``metric`` records."""
        return [record for record in self.ranks.get(rank, ()) if record["kind"] == kind]


def write_about(directory: Path, about: Record) -> None:
    """Write run.json whole or not at all."""
    text = json.dumps({"format": FORMAT, **about}, indent=2, default=_plain) + "\n"
    write_whole(directory / "run.json", text.encode())


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


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories among ``paths`` and one level below them, in order of name.

    Raises DistcompError for a path that is no run and holds none.
    """
    directories: list[Path] = []
    for path in paths:
        runs = (
            [path]
            if (path / "run.json").is_file()
            else sorted(about.parent for about in path.glob("*/run.json"))
        )
        if not runs:
            raise DistcompError(f"{path} holds no run; name a directory with a run.json in it, or its parent")
        directories += [run for run in runs if run not in directories]
    return directories


def read_run(directory: Path) -> Run:
    """Read a run, also one that is still running or was killed in the middle of a line.

    Raises DistcompError where the directory is not a run, or a line before the last is damaged.
    """
    try:
        about = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        version = about["format"]
        _check_about(about)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DistcompError(
            f"{directory} is not the record of a run ({error}); name a directory made by distcomp"
        ) from None
    if version != FORMAT or isinstance(version, bool):
        raise DistcompError(
            f"{directory} is in format {version}, this distcomp reads {FORMAT}; use the version that wrote it"
        )
    ranks: dict[int, tuple[Record, ...]] = {}
    for path in directory.glob("rank*.jsonl"):
        number = path.stem.removeprefix("rank")
        if number.isdecimal():
            ranks[int(number)] = tuple(read_lines(path))
    notes = [note for note in ranks.get(0, ()) if note["kind"] == "note"]
    for note in notes:
        about |= {key: value for key, value in note.items() if key != "kind"}
    attached = dict.fromkeys(note["method"] for note in notes if note.get("method"))
    if attached:  # one after the other, where there were several
        about["method"] = ", then ".join(attached)
    if about.get("ranks") is None and ranks:
        about["ranks"] = len(ranks)
    return Run(directory, about, {rank: _latest(ranks[rank]) for rank in sorted(ranks)})


def read_lines(path: Path) -> Iterator[Record]:
    """The records of one rank's file. What follows the last newline was never finished and is left out."""
    *whole, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            _check_record(record)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DistcompError(
                f"line {number} of {path} is damaged ({error}); remove that line to read the rest"
            ) from None
        yield record


def _check_record(record: Any) -> None:
    """Raise ValueError, KeyError or TypeError for a line that no recorder wrote. What a script logged itself
    may be anything."""
    if record["kind"] not in KINDS:
        raise ValueError(f"unknown kind {str(record['kind'])[:40]!r}")
    if record["kind"] == "note":
        _check_about(record)
        return
    if not isinstance(record["step"], int) or isinstance(record["step"], bool):
        raise ValueError(f"the step {str(record['step'])[:40]!r} is not a whole number")
    if record["kind"] == "metric":
        return
    if record["kind"] == "detail":
        _check_detail(record)
        return
    for name in COUNTED:
        _check_counted(name, record.get(name))
    for group in GROUPED:
        for name, value in _mapping(group, record.get(group)).items():
            _check_counted(f"{group}/{name}", value)


def _check_detail(record: Any) -> None:
    for name, value in _mapping("memory", record.get("memory")).items():
        _check_counted(f"memory/{name}", value)
    for parameter, found in _mapping("parameters", record.get("parameters")).items():
        for name in DETAILED:
            _check_counted(f"parameters/{parameter}/{name}", _mapping(parameter, found).get(name))
    _check_counted("ready_s", record.get("ready_s"))
    for span in record.get("spans") or ():
        phase, *numbers = span
        if not isinstance(phase, str) or len(numbers) != 4 or any(number is None for number in numbers):
            raise ValueError(f"a span is {str(span)[:40]!r}")
        for number in numbers:
            _check_counted("a span", number)


def _check_counted(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} is {str(value)[:40]!r}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value


def _check_about(about: Any) -> None:
    """Raise ValueError or TypeError where what was run is not said in the kinds that a launcher writes."""
    _mapping("a description", about)
    for name in ("method", "asked", "method_from", "commit", "started"):
        if not isinstance(about.get(name), str | None):
            raise ValueError(f"{name} is {str(about[name])[:40]!r}")
    ranks, argv = about.get("ranks"), about.get("argv")
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
        raise ValueError(f"ranks is {str(ranks)[:40]!r}")
    if argv is not None and not (
        isinstance(argv, list) and all(isinstance(argument, str) for argument in argv)
    ):
        raise ValueError(f"argv is {str(argv)[:40]!r}")
    for name in ("host", "versions"):
        _mapping(name, about.get(name))
    network = _mapping("network", about.get("network"))
    for name in ("asked", "fabric", "packets", "achieved"):
        if not isinstance(network.get(name), str | None):
            raise ValueError(f"network/{name} is {str(network[name])[:40]!r}")
    links = network.get("links")
    if links is not None and not (isinstance(links, list) and all(isinstance(one, dict) for one in links)):
        raise ValueError(f"network/links is {str(links)[:40]!r}")
    for link in links or ():
        for name in ("asked_bps", "achieved_bps", "after_idle_bps"):
            if link.get(name) != math.inf:
                _check_counted(name, link.get(name))


def measured(value: object) -> float | None:
    """What a script logged, as a number to reckon with: None for what is no number, infinite where it is
    larger than anything that is measured."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value != value or abs(value) <= LARGEST:
        return float(value)
    return math.inf if value > 0 else -math.inf


def _latest(records: Iterable[Record]) -> tuple[Record, ...]:
    """Steps and metrics; a resumed run goes back, and what it repeats replaces what it had done before."""
    kept: list[Record] = []
    for record in records:
        if record["kind"] == "note":
            continue
        kind, step = record["kind"], record["step"]
        if kind == "metric" and kept and (kept[-1]["kind"], kept[-1]["step"]) == (kind, step):
            kept[-1] = {**kept[-1], **record}  # recorded in two halves
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
