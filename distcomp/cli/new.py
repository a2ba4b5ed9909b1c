"""``distcomp new``: a method or compressor of one's own: its file, its test and its oracle."""

from __future__ import annotations

import argparse
import keyword
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from distcomp.atomic_write import write_whole
from distcomp.errors import DistcompError

DESCRIPTION = """\
Write three files that work as they are, to begin with: NAME.py (a method that
rounds and averages, or a compressor that cuts mantissas), NAME_oracle.py (its
equations in NumPy), and test_NAME.py, which holds the one to the other.
"""
FILES = {"{}.py": "my_{}.py", "{}_oracle.py": "my_{}_oracle.py", "test_{}.py": "test_my_{}.py"}
"""What is written, by the name -> which skeleton it is made from, by the kind."""
CARRIED = {"method": "{}", "compressor": "ef21:compressor={}"}
"""The method that tries it."""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "new", help="begin a method or compressor of your own", description=DESCRIPTION, formatter_class=plain
    )
    parser.add_argument("kind", choices=tuple(CARRIED), metavar="KIND", help="method or compressor")
    parser.add_argument("called", metavar="NAME", help="in lower case, such as top_half")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="where the files go (default: here)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the files, and say what to do with them."""
    kind, name, folder = arguments.kind, arguments.called, arguments.output
    check_new_name(kind, name)
    texts = skeletons(kind, name)
    write(folder, texts)
    file = folder / f"{name}.py"
    print(f"wrote {', '.join(texts)}; next:\n")
    print(f"  pytest {folder / f'test_{name}.py'}")
    print(f"  distcomp methods --import {file} {name}")
    tried = CARRIED[kind].format(name)
    print(f'  distcomp bench --import {file} --methods "ddp; {tried}" SCRIPT')
    return 0


def check_new_name(kind: str, name: str) -> None:
    """Raise DistcompError for a name that is none, or that something has already."""
    from distcomp.plugins import load_plugins
    from distcomp.registry import COMPRESSORS, METHODS, load_all

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name.startswith("test_"):
        raise DistcompError(
            f"{name!r} is no name for a {kind}; use small letters, digits and _, such as top_half"
        )
    load_all()
    load_plugins()
    table: Mapping[str, object] = METHODS if kind == "method" else COMPRESSORS
    if name in table:
        raise DistcompError(f"there is a {kind} {name!r} already (distcomp methods); choose another name")


def skeletons(kind: str, name: str) -> dict[str, str]:
    """File name -> text: the skeletons of a kind under a name of one's own."""
    folder = resources.files("distcomp.cli") / "skeletons"
    title = "".join(part.capitalize() for part in name.split("_"))
    made = {}
    for target, source in FILES.items():
        text = (folder / source.format(kind)).read_text(encoding="utf-8")
        text = text.replace(f"my_{kind}", name).replace(f"My{kind.capitalize()}", title)
        made[target.format(name)] = text
    return made


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """All of them, or none where one is there already."""
    there = next((name for name in texts if (folder / name).exists()), None)
    if there is not None:
        raise DistcompError(
            f"{folder / there} is there already and is left alone; choose another NAME or -o DIR"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(folder / name, text.encode())
    except OSError as error:
        raise DistcompError(f"{folder} cannot be written ({error}); name another directory with -o") from None
