"""What can I run from a shell? One file per command: what it takes (``add``) and what it does (``run``)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from distcomp.cli import (
    advise,
    compress,
    decompress,
    doctor,
    emulate,
    methods,
    probe,
    report,
    run,
    simulate,
)
from distcomp.errors import DistcompError

COMMANDS = (run, emulate, probe, advise, simulate, report, methods, compress, decompress, doctor)

DESCRIPTION = """\
Distributed training in fewer bits: compress what PyTorch workers say to each
other, see it on a slow network made on this machine, and report what it saved.
"""
EPILOG = """\
A first look, on a network that does not exist:

  distcomp emulate --ranks 4 --rate 100mbit examples/digits.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The status: 0, 1 (it ran and something failed), 2 (a mistake), 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without "×" is no reason to fail
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 2
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except DistcompError as error:
        print(f"distcomp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing more may be written to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """Mistakes are told as every other error is: one sentence and a remedy."""

    def error(self, message: str) -> NoReturn:
        raise DistcompError(f"{message}; see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="distcomp", description=DESCRIPTION, epilog=EPILOG, formatter_class=plain)
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        from distcomp import __version__

        print(f"distcomp {__version__}")
        parser.exit()
