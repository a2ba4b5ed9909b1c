"""What the benchmarks share: arguments, ranks on an emulated network, and result files that say where their
numbers come from.

A benchmark is a module, run from the root of the repository: ``python -m benchmarks.NAME``. One that needs
ranks starts *itself* on each of them: :func:`on_network` runs ``python -m`` with the module's name, so that a
rank finds its helpers as its parent does, and hands it settings in the environment; :func:`start` at the end
of the module tells the two apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import distcomp
from benchmarks._places import RESULTS, ROOT
from distcomp.network import Fabric, emulate
from distcomp.network.launch import show_nothing
from distcomp.recording import surroundings

SETTINGS = "DISTCOMP_BENCHMARK"
"""The variable that holds a rank's settings, as JSON."""


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def rank_command(module: str) -> list[str]:
    """What starts ``module`` of this package, wherever the working directory is."""
    return [sys.executable, "-m", f"benchmarks.{module}"]


def rank_environment(settings: Any) -> dict[str, str]:
    """What a rank is told: its settings, and where this package lies."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {SETTINGS: json.dumps(settings), "PYTHONPATH": path}


def on_network(
    module: str,
    ranks: int,
    rate: str,
    settings: Any,
    delay: str = "0ms",
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """As :func:`on_fabric`, with equal links."""
    return on_fabric(module, Fabric.uniform(ranks, rate, delay), settings, env)


def on_fabric(
    module: str, fabric: Fabric, settings: Any, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``benchmarks.<module>`` on every rank of an emulated network; rank 0's answer is its last line of
    JSON.

    Returns that, with what the network's self-test measured.
    """
    with emulate(fabric) as net:
        for line in net.describe():
            print(line, file=sys.stderr)
        told = {**rank_environment(settings), **(env or {})}
        result = net.launch(rank_command(module), env=told, show=show_nothing)
        if not result.ok:
            failed = result.first_failure or 0
            raise distcomp.DistcompError(
                f"benchmarks.{module} failed on rank {failed}: {result.outputs[failed][-3000:]}"
            )
        lines = [line for line in result.outputs[0].splitlines() if line.startswith("{")]
        answer: dict[str, Any] = json.loads(lines[-1])
        return {"network": net.describe(), "real_packets": net.real_packets, **answer}


def start(main: Callable[[], Any], rank_main: Callable[[Any], Mapping[str, Any]] | None = None) -> None:
    """The end of every module: ``main()``; or, on a rank that :func:`on_network` started, ``rank_main`` of
    the settings, inside a process group on one thread. What rank 0 returns is printed."""
    if rank_main is None or SETTINGS not in os.environ:
        main()
        return
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    answer = rank_main(json.loads(os.environ[SETTINGS]))
    if dist.get_rank() == 0:
        print(json.dumps(answer))
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads that let go of Python objects while the interpreter ends abort the process now and then,
    # with FSDP2 by itself, too ("terminate called without an active exception"): what was measured stands.
    os._exit(0)


def call(command: Sequence[str | Path], **options: Any) -> str:
    """What a command prints. Ends the script with what it said where it fails."""
    told = [str(one) for one in command]
    done = subprocess.run(told, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(told)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def gathered(mine: Any) -> list[Any]:
    """What every rank has, in order of rank."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def write(name: str, result: Mapping[str, Any], seed: int = 0, folder: Path = RESULTS) -> Path:
    """``benchmarks/results/<name>.json``: the result, and host, torch, commit, seed and date."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    about = surroundings(ROOT)
    path.write_text(json.dumps({"seed": seed, **about, **result}, indent=1, sort_keys=False) + "\n")
    return path


def shows_only(doc: str | None) -> bool:
    """Whether a study was asked to print the tables of what is there, and to train nothing."""
    parser = arguments_of(doc)
    parser.add_argument("--show", action="store_true", help="print the tables and train nothing")
    show: bool = parser.parse_args().show
    return show


def no_more_cells(doc: str | None) -> Callable[[], bool]:
    """Whether a study that goes on where it stopped is to begin no further cell: asked to print its tables,
    or its seconds are over."""
    parser = arguments_of(doc)
    parser.add_argument("--show", action="store_true", help="print the tables and train nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell later than this")
    wanted, begin_s = parser.parse_args(), time.perf_counter()
    return lambda: wanted.show or time.perf_counter() - begin_s > wanted.seconds


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds; no spread of one."""
    return {
        "mean": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


class Cells:
    """Results by key in one JSON file, written after each: a study that is stopped goes on where it was.

    ``plan`` says what they were made with; a file with another plan is refused. ``commit`` names every one
    that made cells.
    """

    def __init__(self, name: str, plan: Mapping[str, Any]) -> None:
        self.path = RESULTS / f"{name}.json"
        self.path.parent.mkdir(exist_ok=True)
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        if old and old["plan"] != json.loads(json.dumps(plan)):
            raise SystemExit(
                f"{self.path} belongs to another plan ({old['plan']}); move it away to start anew"
            )
        begun = {**surroundings(ROOT), "plan": dict(plan), "cells": {}}
        self.document: dict[str, Any] = old or begun
        self._commit = begun["commit"]

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``key``: from the file, or made and written."""
        cells: dict[str, dict[str, Any]] = self.document["cells"]
        if key not in cells:
            cells[key] = make()
            if self._commit not in self.document["commit"].split(", "):
                self.document["commit"] += f", {self._commit}"
            self.write()
            shown = {name: value for name, value in cells[key].items() if name != "curve"}
            print(key, shown, file=sys.stderr, flush=True)
        return cells[key]

    def write(self) -> None:
        """Write whole or not at all."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.document, indent=1) + "\n")
        partial.replace(self.path)
