"""Run a command behind one rank's link of a fabric, in a container whose interface may be shaped.

``python -m distcomp.network.container --user distcomp fabric.toml python train.py``: the rank is the variable
``RANK``. Needs CAP_NET_ADMIN until the link is shaped; root is given up before the command starts.
"""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from pathlib import Path

from distcomp.errors import DistcompError
from distcomp.network.fabric import Fabric
from distcomp.network.netns import Refused
from distcomp.network.shape import DEVICE, shape_own


def main() -> None:
    """Shape, become ``--user``, and be replaced by the command."""
    parser = argparse.ArgumentParser(prog="python -m distcomp.network.container", description=__doc__)
    parser.add_argument("--user", help="whom the command runs as (default: who runs this)")
    parser.add_argument("--device", default=DEVICE, help=f"the container's interface (default {DEVICE})")
    parser.add_argument("fabric", type=Path, help="a TOML file, as distcomp emulate takes it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    arguments = parser.parse_args()
    try:
        fabric = Fabric.from_toml(arguments.fabric)
        shape_own(fabric, rank_of(fabric), arguments.device)
    except (DistcompError, Refused) as error:
        sys.exit(f"distcomp: {error}")
    if arguments.user is not None:
        become(arguments.user)
    os.environ["DISTCOMP_DEVICE"] = arguments.device
    os.execvp(arguments.command[0], arguments.command)


def rank_of(fabric: Fabric) -> int:
    """The variable RANK, if it is a rank of the fabric. Raises DistcompError otherwise."""
    rank = os.environ.get("RANK", "")
    if not rank.isdecimal() or int(rank) >= fabric.ranks:
        raise DistcompError(f"RANK is {rank!r}; set it to a rank of the fabric, 0 to {fabric.ranks - 1}")
    return int(rank)


def become(user: str) -> None:
    """Give up root, and its capabilities with it, for good."""
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir


if __name__ == "__main__":
    main()
