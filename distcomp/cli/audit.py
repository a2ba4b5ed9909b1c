"""``distcomp audit``: every collective of a training step, and what each setting would save."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distcomp.cli.run import existing
from distcomp.errors import DistcompError
from distcomp.network.launch import MEMORY_ENV

DESCRIPTION = """\
Run SCRIPT for a few steps and say what they send: every collective by kind,
module and type, the bytes of each, where most of them go, what runs in a wider
type than was asked for, and what each setting of distcomp would save.

SCRIPT is any training script with a DistributedDataParallel or FSDP2 model and
an optimizer; it attaches nothing, or what it likes. It is started on --ranks
processes of this machine; under torchrun each process audits itself.
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "audit", help="say what a training step sends", description=DESCRIPTION, formatter_class=plain
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps to look at (default 2)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or be one of them."""
    script = existing(arguments.script)
    if arguments.ranks < 1 or arguments.steps < 1:
        raise DistcompError("--ranks and --steps are 1 or more")
    if "RANK" not in os.environ:
        return _launched(arguments, script)
    from distcomp.attaching.audit_script import audit_script

    first = os.environ["RANK"] == "0"
    seen = audit_script(script, [one for one in arguments.arguments if one != "--"], arguments.steps)
    if first:
        print(json.dumps(seen.as_dict(), indent=2) if arguments.json else seen)
    return 0


def _launched(arguments: argparse.Namespace, script: Path) -> int:
    """The status of torchrun, which starts this command on each rank."""
    options = ["--steps", str(arguments.steps), *(["--json"] if arguments.json else [])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ranks = ["--nproc-per-node", str(arguments.ranks)]
    command = [*torchrun, *ranks, "-m", "distcomp", "audit", *options, str(script), *arguments.arguments]
    status = subprocess.run(command, env={**MEMORY_ENV, **os.environ}).returncode
    return status if status >= 0 else 128 - status
