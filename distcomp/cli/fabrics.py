"""The options that say which network: a file, or ranks, rate and delay."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distcomp.errors import DistcompError

if TYPE_CHECKING:
    from distcomp.network import Fabric


def add_fabric(parser: argparse.ArgumentParser, count: str) -> None:
    """``--fabric``, ``count`` (``--ranks`` or ``--workers``), ``--rate`` and ``--delay``."""
    network = parser.add_argument_group("network")
    network.add_argument(count, type=int, metavar="N", help="how many (default: as many as the fabric has)")
    network.add_argument("--rate", metavar="RATE", help="of each one's link, such as 10gbit (the default)")
    network.add_argument("--delay", metavar="TIME", help="one way, such as 50us (default none)")
    network.add_argument(
        "--fabric", type=Path, metavar="FILE", help="a TOML file with ranks, rates and racks"
    )


def fabric_of(arguments: argparse.Namespace, count: str) -> Fabric:
    """The fabric that the options describe.

    With a file and another number of ranks: that many, in racks as large as the file's, of the same rates.
    Raises DistcompError where that is not one fabric.
    """
    from distcomp.network import Fabric

    ranks = getattr(arguments, count)
    if arguments.fabric is None:
        if ranks is None:
            raise DistcompError(f"say how many there are: --{count} 64, or --fabric with a file that says it")
        return Fabric.uniform(ranks, arguments.rate or "10gbit", arguments.delay or 0.0)
    if arguments.rate is not None or arguments.delay is not None:
        raise DistcompError("--fabric describes the links; leave out --rate and --delay")
    fabric = Fabric.from_toml(arguments.fabric)
    return fabric if ranks is None else fabric.of(ranks)
