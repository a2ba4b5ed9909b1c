"""``--import``: methods of the user's own, registered before any name is looked up."""

from __future__ import annotations

import argparse
from pathlib import Path

from distcomp.plugins import name_in_environment


def add_import(parser: argparse.ArgumentParser) -> None:
    """The option."""
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="a module or file.py that registers methods of your own",
    )  # fmt: skip


def import_plugins(arguments: argparse.Namespace, script: Path | None = None) -> None:
    """Import them here, and in every process that is started from here."""
    name_in_environment(arguments.imports, script.parent if script is not None else None)
