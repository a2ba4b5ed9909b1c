"""``distcomp bench``: which method is fastest for a script on this machine, as it is?"""

from __future__ import annotations

import argparse
import os
from typing import Any

from distcomp.cli import emulate
from distcomp.errors import DistcompError

REPEATS = 2

DESCRIPTION = """\
Run SCRIPT once per method on the ranks of this machine, as it is: no network
is made and no rate is held. Each method runs twice, in turn, so that chance
is known. Then compare: a table, and DIR/report.html.

The script calls distcomp.attach(model, optimizer) and logs what it learns with
handle.log(test_loss=...). For another network: distcomp emulate.
"""
EPILOG = f"""\
examples:
  distcomp bench examples/digits.py --steps 80
  distcomp bench --ranks 8 --methods "ddp; bf16; mine" --import mine.py train.py

methods if none are named:
  {emulate.METHODS}
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "bench", help="compare methods on this machine", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=plain,
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes (default: the GPUs, or 2 to 8 by the cores)"
    )
    emulate.add_comparison(parser, REPEATS, again=str(REPEATS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 if a method failed."""
    from distcomp.network import Fabric

    ranks = ranks_here() if arguments.ranks is None else arguments.ranks
    if ranks < 2:
        raise DistcompError(f"--ranks is {ranks}; there is nothing to exchange below 2")
    return emulate.run_comparison(arguments, Fabric.uniform(ranks), as_it_is=True)


def ranks_here() -> int:
    """One for each GPU, where there are several; else one for each core, 2 to 8."""
    import torch

    if torch.cuda.device_count() > 1:
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, 2), 8)
