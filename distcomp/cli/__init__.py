"""What can I run from a shell? One file per command: what it takes (``add``) and what it does (``run``)."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from distcomp.cli import (
    advise,
    audit,
    bench,
    completion,
    compress,
    decompress,
    doctor,
    emulate,
    methods,
    new,
    probe,
    report,
    run,
    simulate,
)
from distcomp.errors import DistcompError

COMMANDS = (
    run, bench, emulate, probe, audit, advise, simulate, report, methods, new, compress, decompress, doctor,
    completion,
)  # fmt: skip

DESCRIPTION = """\
Distributed training in fewer bits: compress what PyTorch workers send to each
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
    shell = parser()
    shell.called = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = shell.parse_args(argv)
        if arguments.command is None:
            shell.print_help()
            return 2
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except DistcompError as error:
        print(f"distcomp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _unwritable(error)


def _unwritable(error: OSError) -> int:
    """What was written to is full or closed: no traceback, wherever that was met. Other errors are raised."""
    if isinstance(error, BrokenPipeError):  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        raise error
    name = error.filename or "the output"
    print(f"distcomp: {name} cannot be written ({error.strerror}); make room there", file=sys.stderr)
    with suppress(OSError, ValueError):  # what waits in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


class _Parser(argparse.ArgumentParser):
    """Mistakes are reported as every other error is: one sentence and a remedy."""

    known: Mapping[str, argparse.ArgumentParser] = {}
    """The commands below this one."""
    called: Sequence[str] = ()
    """What the shell was given."""

    def error(self, message: str) -> NoReturn:
        raise DistcompError(f"{message}; {self._close_to(message)}see: {self.prog} --help")

    def _close_to(self, message: str) -> str:
        """What may have been meant by an option or command that there is none of."""
        unknown = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (--[^ =]+)", message)
        if unknown is None:
            return ""
        wrong = unknown[1] or unknown[2]
        known = list(self.known) if unknown[1] else re.findall(r"--[a-z][a-z_-]+", self._help_of())
        close = difflib.get_close_matches(wrong, known, n=1)
        return f"did you mean {close[0]}? " if close else ""

    def _help_of(self) -> str:
        """Of the command that was called."""
        called = next((one for one in self.called if one in self.known), None)
        return self.known[called].format_help() if called is not None else self.format_help()


def parser() -> _Parser:
    """Of all commands."""
    plain = argparse.RawDescriptionHelpFormatter
    made = _Parser(prog="distcomp", description=DESCRIPTION, epilog=EPILOG, formatter_class=plain)
    made.add_argument("--version", action=_Version, help="print the version and exit")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    made.known = commands.choices
    return made


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        from distcomp import __version__

        print(f"distcomp {__version__}")
        parser.exit()
