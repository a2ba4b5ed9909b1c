"""Does what the pages tell people to type do what they say, and can it be read where it is shown?

    python -m benchmarks.newcomer                  # all of it; writes results/newcomer.json
    python -m benchmarks.newcomer tables own       # parts: commands, blocks, tables, own, paths; others stay

``commands``: every line behind a ``$`` in README, docs, CONTRIBUTING, launchers/ and docker/, page by page in
a directory of its own that holds examples, launchers, a model and the script of docs/start.md; what had to be
written otherwise (host names, ports, processes per node) and what cannot be run here is said with its reason.
``blocks``: every Python block. ``tables``: what prints one, in 60, 80 and 120 columns, on a terminal and
in a pipe: no name cut, no line too wide. ``own``: CONTRIBUTING's compressor and method in the emulator's
table. ``paths``: from a clone to the report, from a script to compressed training, from an idea to a table,
with commands, minutes and files. Fails where anything of it does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, write
from benchmarks._paths import walked
from benchmarks._places import RESULTS, ROOT
from distcomp import recording
from tests.project import newcomer
from tests.project.pages import Command, commands, program, snippets
from tests.terminal import faults, shown

OK = "ok"
LIMIT_S = 900
WIDTHS = (60, 80, 120)

NOT_RUN = {
    r"^pip install": "it installs; benchmarks/install.py does so with every extra",
    r"^scripts/(check|test)\b": "the whole of it runs for every change",
    r"^scripts/demo": "it installs, and ends with the emulation of docs/start.md, which is run",
}
ASKED = {
    "docker": ["docker", "info"],
    "kubectl": ["kubectl", "cluster-info", "--request-timeout=5s"],
    "sbatch": ["sbatch", "--version"],
    "horovodrun": ["horovodrun", "--version"],
    "mpirun": ["mpirun", "--version"],
}
"""What says whether there is a daemon, a cluster or a library behind a program."""
CHANGED = (
    (r"\bnode0\b", "127.0.0.1"),
    (r"\b29500\b", "PORT"),
    (r"PER_NODE=8|--nproc-per-node 8", lambda found: found[0].replace("8", "1")),
    (r" --its-options| -- --its-options", ""),
    (r"\bDIR\b", "checkpoints"),
)
EVERY_NODE = re.compile(r"NODE_RANK=0|--node-rank 0|NODES=2:4")
"""What says that the same is to be said on each node."""


def _changed(text: str, port: int) -> str:
    for pattern, replacement in CHANGED:
        text = re.sub(pattern, replacement, text)
    text = text.replace("PORT", str(port))
    return f"MASTER_PORT={port} {text}" if "MASTER_ADDR" in text else text


def _on_nodes(text: str) -> list[str]:
    """The line as each of two nodes says it, both being this machine."""
    if not EVERY_NODE.search(text):
        return [text]
    if "NODES=2:4" in text:
        alike = f"LAST_CALL_S=3 LOCAL_ADDR=127.0.0.1 {text}"
        return [f"IS_HOST={at} {alike}" for at in (1, 0)]
    return [re.sub(r"(NODE_RANK=|--node-rank )0", rf"\g<1>{at}", text) for at in (0, 1)]


def _why_not(command: Command) -> str | None:
    for pattern, why in NOT_RUN.items():
        if re.search(pattern, command.text):
            return why
    if "launchers/ray" in command.text and importlib.util.find_spec("ray") is None:
        return "Ray is not installed here"
    asked = ASKED.get(command.program)
    if asked is None:
        return None
    if shutil.which(asked[0]) is None:
        return f"there is no {asked[0]} here"
    done = subprocess.run(asked, capture_output=True, timeout=60)
    return None if done.returncode == 0 else f"{' '.join(asked[:2])} finds nothing behind it here"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_command(command: Command, where: Path) -> dict[str, Any]:
    """What became of one line."""
    why = _why_not(command)
    if why is not None:
        return {"outcome": f"not run: {why}"}
    lines = _on_nodes(_changed(command.text, _free_port()))
    began_s = time.perf_counter()
    started = [
        subprocess.Popen(
            ["bash", "-c", line], cwd=where, env=_environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
        )
        for line in lines
    ]  # fmt: skip
    said = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    codes = [process.returncode for process in started]
    good = not any(codes) and not any("Traceback" in text for text in said)
    found: dict[str, Any] = {"outcome": OK if good else f"failed: {codes}", "seconds": _since(began_s)}
    if lines != [command.text]:
        found["typed"] = [re.sub(r"\b\d{5}\b", "PORT", line) for line in lines]
    return found if good else {**found, "said": [text[-2000:] for text in said]}


def _environment() -> dict[str, str]:
    """That of somebody who has installed it: its programs first, no launcher's variables."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    beside = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": beside, "OMP_NUM_THREADS": "1"}


def _since(began_s: float) -> float:
    return round(time.perf_counter() - began_s, 1)


def run_commands(where: Path, pages: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Page by page: what one line writes the next may read."""
    for page, told in groupby(commands(), key=lambda one: one.where):
        if pages and page not in pages:
            continue
        here = newcomer.furnish(where / re.sub(r"\W", "-", page))
        shutil.rmtree(here / "runs")
        for command in told:
            shell_chooses = "--method" in command.text
            (here / "train.py").write_text(newcomer.training_script(names_method=not shell_chooses))
            yield f"{page}: {command.text}", run_command(command, here)


def run_blocks(where: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Python block, as tests/project runs it."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for at, snippet in snippets():
        if "import horovod" in snippet and importlib.util.find_spec("horovod") is None:
            yield at, {"outcome": "not run: Horovod is not installed here; scripts/test-horovod builds it"}
            continue
        done = subprocess.run(
            [sys.executable, "-c", program(snippet)], env=_environment() | alone, cwd=where,
            capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        good = done.returncode == 0
        yield at, {"outcome": OK} if good else {"outcome": "failed", "said": done.stderr[-2000:]}


def run_tables(where: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table in each width, on a terminal and in a pipe."""
    here = newcomer.furnish(where / "tables")
    for name, (command, names) in newcomer.TABLES.items():
        for columns in WIDTHS:
            for terminal in (True, False):
                asked = [*newcomer.DISTCOMP, *command]
                status, text = shown(asked, columns, terminal, here, _environment())
                wrong = faults(text, columns, terminal, names)
                key = f"{name}, {columns} columns, {'terminal' if terminal else 'pipe'}"
                good = status == 0 and not wrong
                yield key, {"outcome": OK} if good else {"outcome": f"failed: {status}", "said": wrong}


def run_own(where: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """CONTRIBUTING's files, beside plain DDP, on two ranks."""
    here = newcomer.furnish(where / "own")
    own = [word for name in newcomer.OWN for word in ("--import", name)]
    methods = ("ddp", "averaging_toy", "ef21:compressor=three_bytes")
    command = [*newcomer.DISTCOMP, "emulate", "--ranks", "2", "--rate", "1gbit", *own]
    command += ["--methods", "; ".join(methods), "-o", "out", "train.py"]
    status, text = shown(command, 100, False, here, _environment())
    for name in methods:
        stands = re.search(rf"^{re.escape(name)}( \(\d runs\))? ", text, flags=re.MULTILINE) is not None
        good = status == 0 and stands
        yield name, {"outcome": OK} if good else {"outcome": f"failed: {status}", "said": [text[-2000:]]}


Part = Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]
PARTS: dict[str, Part] = {
    "commands": run_commands, "blocks": run_blocks, "tables": run_tables, "own": run_own, "paths": walked,
}  # fmt: skip


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--page", action="append", default=[], help="of commands: those of this page alone")
    asked = parser.parse_args()
    failed = 0
    for part in asked.parts or list(PARTS):
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as directory:
            make = partial(run_commands, pages=asked.page) if part == "commands" else PARTS[part]
            for what, outcome in make(Path(directory)):
                print(f"{outcome['outcome']:<8} {part}: {what}", file=sys.stderr, flush=True)
                found[what] = outcome
        failed += sum(one["outcome"].startswith("failed") for one in found.values())
        _merge(part, found, keep=bool(asked.page))
    if failed:
        raise SystemExit(f"{failed} things that the pages say do not hold; results/newcomer.json says which")


def _merge(part: str, found: dict[str, Any], keep: bool) -> None:
    """Write the part; other parts, and where only some pages ran the other pages, stay as they were."""
    path = RESULTS / "newcomer.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = {name: before[name] for name in PARTS if name in before}
    parts[part] = {**(parts.get(part, {}) if keep else {}), **found}
    everything = [one["outcome"] for told in parts.values() for one in told.values()]
    counts = {
        "ok": everything.count(OK),
        "not_run": sum(outcome.startswith("not run") for outcome in everything),
        "failed": sum(outcome.startswith("failed") for outcome in everything),
    }
    commits = {**before.get("commits", {}), part: recording.surroundings(ROOT)["commit"]}
    write("newcomer", {"commits": commits, **counts, **parts})


if __name__ == "__main__":
    main()
