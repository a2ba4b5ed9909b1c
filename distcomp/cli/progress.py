"""What is seen while a comparison runs: a bar per method on a terminal, two lines per method elsewhere."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

POLL_S = 0.2


class Tail:
    """What rank 0 has recorded so far, read again only from where reading stopped."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "rank0.jsonl"
        self._at = 0
        self.steps = 0
        self.of_steps: int | None = None
        self.metric: dict[str, Any] = {}

    def read(self) -> None:
        """Take in the lines that are new and whole."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            self.steps += 1
        elif record["kind"] == "metric":
            self.metric |= record
        else:
            self.of_steps = record.get("steps", self.of_steps)

    @property
    def learnt(self) -> str:
        """Loss and accuracy of the last evaluation."""
        loss, accuracy = self.metric.get("test_loss"), self.metric.get("test_accuracy")
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        return " ".join(parts if accuracy is None else [*parts, f"accuracy {100 * accuracy:.1f} %"])


class Progress(Protocol):
    """Shows one method after the other."""

    def method(self, name: str, directory: Path) -> AbstractContextManager[None]:
        """Show this method while the body runs, from what appears in its record."""


@contextmanager
def progress(methods: Sequence[str], bars: bool = True) -> Iterator[Progress]:
    """Bars where standard error is a terminal and ``rich`` is installed; lines otherwise."""
    rich = _rich() if bars and sys.stderr.isatty() else None
    if rich is None:
        yield _Lines(methods)
        return
    shown = _columns(rich)
    with shown:
        yield _Bars(shown, methods)


class _Lines:
    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = list(methods)

    @contextmanager
    def method(self, name: str, directory: Path) -> Iterator[None]:
        at = f"[{self._methods.index(name) + 1}/{len(self._methods)}]"
        print(f"{at} {name} ...", file=sys.stderr, flush=True)
        yield
        tail = Tail(directory)
        tail.read()
        print(f"{at} {name}: {tail.steps} steps {tail.learnt}".rstrip(), file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, shown: Any, methods: Sequence[str]) -> None:
        self._shown = shown
        self._steps: int | None = None
        width = max(map(len, methods))
        self._tasks = {
            name: shown.add_task(name.ljust(width), total=None, start=False, learnt="") for name in methods
        }

    @contextmanager
    def method(self, name: str, directory: Path) -> Iterator[None]:
        task, tail, over = self._tasks[name], Tail(directory), threading.Event()
        self._shown.start_task(task)
        self._shown.update(task, learnt="starting")
        watcher = threading.Thread(target=self._follow, args=(task, tail, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            self._steps = self._steps or tail.steps
            self._shown.update(task, total=tail.steps)
            self._shown.stop_task(task)

    def _follow(self, task: Any, tail: Tail, over: threading.Event) -> None:
        while True:
            ending = over.wait(POLL_S)
            tail.read()
            of_steps = tail.of_steps or self._steps
            self._shown.update(task, completed=tail.steps, total=of_steps)
            if tail.steps:
                self._shown.update(task, learnt=tail.learnt)
            if ending:
                return


def _rich() -> ModuleType | None:
    try:
        import rich.console
        import rich.progress
    except ImportError:
        return None
    return rich


def _columns(rich: Any) -> Any:
    progress = rich.progress
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[learnt]}", style="dim"),
        console=rich.console.Console(stderr=True),
    )
