"""``distcomp run``: torchrun with distcomp's environment."""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from distcomp import recording
from distcomp.cli import methods
from distcomp.cli.plugins import add_import, import_plugins
from distcomp.errors import DistcompError
from distcomp.network.launch import MEMORY_ENV
from distcomp.plugins import IMPORT

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
        "--nproc", "--nproc-per-node", "--nproc_per_node", default="1", metavar="N",
        help="processes on this host (default 1), or gpu, cpu, auto",
    )  # fmt: skip
    parser.add_argument("--method", help="what DISTCOMP_METHOD says to the script")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="record the run in this directory")
    add_detail(parser, default=0)
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts (default 1)")
    parser.add_argument(
        "--node-rank", "--node_rank", type=int, default=0, metavar="I", help="which host this is (default 0)"
    )
    parser.add_argument("--master", metavar="HOST:PORT", help="where host 0 listens; needed with --nnodes")
    add_import(parser)
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run torchrun and pass its status on."""
    environment = {**MEMORY_ENV, **os.environ}
    _check_count(arguments)
    import_plugins(arguments, None if arguments.module else arguments.script)
    environment[IMPORT] = os.environ.get(IMPORT, "")
    if arguments.method is not None:
        methods.check(arguments.method)
        environment[recording.METHOD] = arguments.method
    environment |= detail(arguments)
    script = ["-m", str(arguments.script)] if arguments.module else [str(existing(arguments.script))]
    nodes = _nodes(arguments)
    if arguments.output is not None:
        environment[recording.RUN_DIR] = str(arguments.output.resolve())
        if arguments.node_rank == 0:
            _describe(arguments, environment.get(recording.METHOD))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *nodes,
        *script,
        *arguments.arguments,
    ]
    status = subprocess.run(command, env=environment).returncode
    if arguments.output is not None and status == 0 and arguments.node_rank == 0:
        _check_attached(arguments)
        print(f"recorded in {arguments.output}; see it with: distcomp report {arguments.output}")
    return status if status >= 0 else 128 - status


def _check_attached(arguments: argparse.Namespace) -> None:
    """Raise DistcompError where the script attached nothing, or not what ``--method`` asked for."""
    attached = recording.read_run(arguments.output).about.get("method")
    if attached is None:
        raise DistcompError(
            f"{arguments.script} ended well but attached no method, so {arguments.output} holds no record; "
            "let it call distcomp.attach(model, optimizer)"
        )
    if arguments.method is not None and attached != arguments.method:
        raise DistcompError(
            f"{arguments.script} attached {attached} and not {arguments.method}, which --method asked for "
            f"(the record in {arguments.output} says so); leave the method out in the script: "
            "distcomp.attach(model, optimizer)"
        )


def add_detail(parser: argparse.ArgumentParser, default: int) -> None:
    """How often a step is looked at closely."""
    parser.add_argument(
        "--detail", type=int, default=default, metavar="N",
        help=f"record what compression leaves out every N steps; 0: never (default {default})",
    )  # fmt: skip


def detail(arguments: argparse.Namespace) -> dict[str, str]:
    """What the ranks are told of it."""
    if arguments.detail < 0:
        raise DistcompError(f"--detail is {arguments.detail}; give a number of steps, or 0 for never")
    return {recording.DETAIL_EVERY: str(arguments.detail)} if arguments.detail else {}


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


def dated_directory(parent: Path) -> Path:
    """A new directory under ``parent`` that is called after the date and time, and by a number as well where
    others began in the same second."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for again in itertools.count(1):
            directory = parent / (name if again == 1 else f"{name}-{again}")
            with suppress(FileExistsError):
                directory.mkdir()
                return directory
    except OSError as error:
        raise DistcompError(f"{parent} cannot be made ({error}); name another directory with -o") from None
    raise AssertionError("counting has no end")


def _check_count(arguments: argparse.Namespace) -> None:
    """Raise DistcompError for a number of processes or hosts that cannot be."""
    nproc = arguments.nproc
    if nproc == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise DistcompError("--nproc gpu, but torch sees no GPU here; give a number, or cpu")
    elif nproc not in ("cpu", "auto") and not (nproc.isdecimal() and int(nproc) >= 1):
        raise DistcompError(f"--nproc is {nproc!r}; give a whole number of 1 or more, or gpu, cpu, auto")
    if arguments.nnodes < 1 or not 0 <= arguments.node_rank < arguments.nnodes:
        raise DistcompError(
            f"--nnodes {arguments.nnodes} and --node-rank {arguments.node_rank} do not fit; there is 1 "
            "host or more, and the first has rank 0"
        )


def _describe(arguments: argparse.Namespace, method: str | None) -> None:
    directory = new_directory(arguments.output)
    about = {
        "asked": method,
        "ranks": int(arguments.nproc) * arguments.nnodes if arguments.nproc.isdecimal() else None,
        "argv": [str(arguments.script), *arguments.arguments],
        **recording.surroundings(Path.cwd() if arguments.module else arguments.script.resolve().parent),
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
    if not 0 < int(port) < 1 << 16:
        raise DistcompError(f"--master names port {port}; ports are 1 to 65535")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DistcompError(
            f"--master names the host {host!r}, which is not known here ({error}); give its name or address "
            "as every host resolves it"
        ) from None
    return [
        nproc, f"--nnodes={arguments.nnodes}", f"--node-rank={arguments.node_rank}",
        f"--master-addr={host}", f"--master-port={port}",
    ]  # fmt: skip
