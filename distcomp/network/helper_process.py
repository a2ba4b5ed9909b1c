"""Start one of this package's helper processes without importing all of distcomp (torch would bring threads).

`unshare` of a user namespace refuses a process with threads, and a helper should start in milliseconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = """
import importlib, sys, types
for name, folder in (("distcomp", sys.argv[1]), ("distcomp.network", sys.argv[1] + "/network")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
importlib.import_module(sys.argv[2]).main(*sys.argv[3:])
"""


def command(module: str, *arguments: str) -> list[str]:
    """The argv that runs ``distcomp.network.<module>.main(*arguments)`` in a fresh, small Python."""
    package = str(Path(__file__).resolve().parent.parent)
    return [sys.executable, "-P", "-c", _PROGRAM, package, f"distcomp.network.{module}", *arguments]
