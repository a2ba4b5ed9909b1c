"""Where a part of :mod:`benchmarks.gpu` runs: on GPUs, or on a CPU that rehearses it; and its ranks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import rank_command, rank_environment
from benchmarks._places import ROOT

PATIENCE = 5
"""So many times longer a rehearsal may take: small, but on a CPU that others use, too."""
LINES, LETTERS = 12, 1500
"""Of what a failed rank wrote last, so much is told."""

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
REPRODUCIBLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""cuBLAS then gives the same bits whatever other streams do, as its documentation says."""


@dataclass(frozen=True)
class Place:
    """What a part is told: the devices, and whether this is a rehearsal of small sizes on a CPU."""

    rehearsal: bool
    seed: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def ranks(self) -> int:
        """One for each GPU; a rehearsal has two."""
        return 2 if self.rehearsal else torch.cuda.device_count()

    def about(self) -> dict[str, Any]:
        """The devices and what drives them."""
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton()}
        if self.rehearsal:
            return {"rehearsal": "on a CPU, small sizes: nothing here was measured on a GPU", **versions}
        one = torch.cuda.get_device_properties(0)
        return {
            "gpu": one.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{one.major}.{one.minor}",
            "memory_bytes": one.total_memory,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            **versions,
        }


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


class RankFailed(Exception):
    """A rank raised, was killed, or did not end in time; the text has its last words."""


def on_ranks(job: str, size: int, device: str, backend: str, settings: Mapping[str, Any]) -> list[Any]:
    """What ``benchmarks._gpu_training``'s ``job`` answers on each of ``size`` processes of this host.

    Raises RankFailed as soon as one fails or ``settings["limit_s"]`` is over; no process is left.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = {"job": job, "device": device, "backend": backend, "answers": name, **settings}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**LOOPBACK, **REPRODUCIBLE, **os.environ, **rank_environment(told)}
        shared |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared.pop("TRITON_INTERPRET", None)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                with (folder / f"said-{rank}").open("wb") as said:
                    processes.append(subprocess.Popen(
                        rank_command("_gpu_training"), cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    ))  # fmt: skip
            _wait(processes, folder, job, settings["limit_s"])
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads((folder / f"answer-{rank}").read_text()) for rank in range(size)]


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, job: str, limit_s: float) -> None:
    """Until all have ended well. Raises RankFailed for the first that did not."""
    end_s = time.monotonic() + limit_s
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            try:
                code = process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            if code:
                raise RankFailed(f"{job}: rank {rank} ended with {code}: {_last_words(folder, rank)}")
            del waiting[rank]
        if waiting and time.monotonic() > end_s:
            rank = min(waiting)
            raise RankFailed(
                f"{job}: rank {rank} had not ended after {limit_s:g} s: {_last_words(folder, rank)}"
            )


def _last_words(folder: Path, rank: int) -> str:
    lines = (folder / f"said-{rank}").read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-LINES:])[-LETTERS:] or "it said nothing"


def interpreted() -> None:
    """Start this process once more with Triton's interpreter, which must be asked for before the import."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [*rank_command("gpu"), *sys.argv[1:]], environment)
