"""``distcomp run``: torchrun with distcomp's environment."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distcomp import recording
from distcomp.cli import methods
from distcomp.errors import DistcompError
from distcomp.network.launch import MEMORY_ENV

DESCRIPTION = """\
Start SCRIPT on this machine, one process per rank, as torchrun does. A script
that calls distcomp.attach(model, optimizer) takes its method from --method.
"""
EPILOG = """\
Over several hosts, say the same on each with its own --node-rank:

  distcomp run --nnodes 2 --node-rank 0 --master host0:29500 train.py
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "run", help="start a script on this machine's ranks", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=plain,
    )  # fmt: skip
    parser.add_argument(
        "--nproc", default="1", metavar="N", help="processes on this host (default 1), or gpu"
    )
    parser.add_argument("--method", help="what DISTCOMP_METHOD says to the script")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="record the run in this directory")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts (default 1)")
    parser.add_argument(
        "--node-rank", type=int, default=0, metavar="I", help="which host this is (default 0)"
    )
    parser.add_argument("--master", metavar="HOST:PORT", help="where host 0 listens; needed with --nnodes")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run torchrun and pass its status on."""
    environment = {**MEMORY_ENV, **os.environ}
    if arguments.method is not None:
        methods.check(arguments.method)
        environment[recording.METHOD] = arguments.method
    script = existing(arguments.script)
    if arguments.output is not None:
        environment[recording.RUN_DIR] = str(arguments.output.resolve())
        if arguments.node_rank == 0:
            _describe(arguments, environment.get(recording.METHOD))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *_nodes(arguments),
        str(script),
        *arguments.arguments,
    ]
    status = subprocess.run(command, env=environment).returncode
    if arguments.output is not None and status == 0 and arguments.node_rank == 0:
        print(f"recorded in {arguments.output}; see it with: distcomp report {arguments.output}")
    return status if status >= 0 else 128 - status


def existing(script: Path) -> Path:
    """``script`` if it is a file."""
    if not script.is_file():
        raise DistcompError(f"{script} is not a file; name the training script")
    return script


def new_directory(path: Path) -> Path:
    """Make a directory for records; refuse one that holds something, for records are appended to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise DistcompError(f"{path} is not empty; name a new directory with -o, or remove it")
    except OSError as error:
        raise DistcompError(f"{path} cannot be made ({error}); name another directory with -o") from None
    return path


def _describe(arguments: argparse.Namespace, method: str | None) -> None:
    directory = new_directory(arguments.output)
    about = {
        "method": method,
        "ranks": int(arguments.nproc) * arguments.nnodes if arguments.nproc.isdecimal() else None,
        "argv": [str(arguments.script), *arguments.arguments],
        **recording.surroundings(arguments.script.resolve().parent),
    }
    recording.write_about(directory, about)


def _nodes(arguments: argparse.Namespace) -> list[str]:
    """torchrun's own options."""
    nproc = f"--nproc-per-node={arguments.nproc}"
    if arguments.nnodes == 1:
        return ["--standalone", nproc]
    host, colon, port = (arguments.master or "").rpartition(":")
    if not colon or not port.isdecimal():
        raise DistcompError("several hosts need a meeting place; give --master HOST:PORT, the same on each")
    return [
        nproc, f"--nnodes={arguments.nnodes}", f"--node-rank={arguments.node_rank}",
        f"--master-addr={host}", f"--master-port={port}",
    ]  # fmt: skip
