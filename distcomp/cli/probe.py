"""``distcomp probe``: what network is this? Measured between the ranks of any launcher."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcomp.cli.outputs import write_output
from distcomp.errors import DistcompError, require

if TYPE_CHECKING:
    from distcomp.transports.timing import Probed

DESCRIPTION = """\
Measure the network between ranks and write it as a fabric file. Start it on
every rank, with any launcher that sets RANK, WORLD_SIZE and MASTER_ADDR:

  torchrun --nproc-per-node 4 -m distcomp probe -o fabric.toml
"""
SIZES = (1, 1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
REPEATS = 7


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "probe", help="measure the network between ranks", description=DESCRIPTION, formatter_class=plain
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the fabric goes (TOML)")
    parser.add_argument("--json", action="store_true", help="print every pair's times and curve")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="message time against size (.svg, .png)")
    parser.add_argument(
        "--largest", type=int, default=SIZES[-1], metavar="BYTES", help="message (default 1 MiB)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure on every rank; rank 0 fits, writes and prints."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise DistcompError("probe runs on every rank: torchrun --nproc-per-node 4 -m distcomp probe")
    if int(os.environ["WORLD_SIZE"]) < 2:
        raise DistcompError("there is no network between 1 rank; start 2 or more")
    if arguments.largest <= SIZES[1]:
        raise DistcompError(f"--largest is above {SIZES[1]} bytes, for a rate is the slope of a curve")
    from distcomp.transports.timing import probed

    sizes = [one for one in SIZES if one < arguments.largest] + [arguments.largest]
    found = probed(sizes, REPEATS)
    if found is not None:
        tell(found, arguments)
    return 0


def tell(found: Probed, arguments: argparse.Namespace) -> None:
    """Write the fabric, print it or everything."""
    text = found.fabric.to_toml()
    spread = sorted(link.spread for link in found.links.values())[len(found.links) // 2]
    if arguments.output is not None:
        write_output(arguments.output, text.encode(), b"ranks = ", "fabric")
    if arguments.plot is not None:
        plot(found, arguments.plot)
    if arguments.json:
        pairs = [
            {"pair": list(pair), **asdict(link), "times_s": found.times_s[pair]}
            for pair, link in found.links.items()
        ]
        told = {"fabric": text, "spread": spread, "sizes": found.sizes, "pairs": pairs}
        print(json.dumps(told, indent=1))
        return
    print(text, end="")
    print(f"# messages of one size differ by {spread:.0%} (median over pairs)", file=sys.stderr)


def plot(found: Probed, path: Path) -> None:
    """Every pair's measurements and the curve through them."""
    require("matplotlib", extra="report").use("Agg")
    pyplot = require("matplotlib.pyplot", extra="report")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for pair, link in found.links.items():
        (line,) = axes.loglog(found.sizes, link.curve_s, linewidth=1, label=f"{pair[0]} to {pair[1]}")
        for size, times_s in zip(found.sizes, found.times_s[pair], strict=True):
            axes.plot([size] * len(times_s), times_s, ".", color=line.get_color(), markersize=3)
    axes.set_xlabel("message (bytes)")
    axes.set_ylabel("one way (s)")
    if len(found.links) <= 10:
        axes.legend()
    try:
        figure.savefig(path, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise DistcompError(f"{path} cannot be written ({error}); name a .svg or .png file") from None
    finally:
        pyplot.close(figure)
