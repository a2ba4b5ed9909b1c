"""What to do where a setting is refused: which one it is, what it may be, and what it usually is.

Read from the code around the sentence: names between ‹ › that are arguments or fields there, with their
defaults, and the values behind the names in capitals.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import distcomp

SOURCES = Path(distcomp.__file__).parent
MOST_VALUES = 12


def remedy(file: str, line: int, text: str) -> str:
    """Which settings to change, what their defaults are, and what the names in capitals stand for."""
    gaps = re.findall(r"‹(\w+)›", text)
    known = _defaults(file, line)
    given = re.findall(r"‹(\w+)›", text.rpartition(", not ")[2]) if ", not " in text else gaps
    names = dict.fromkeys(name for name in given if not name.isupper())
    said = [f"`{name}` ({known[name]})" if name in known else f"`{name}`" for name in names]
    parts = [f"change {_and(said)}"] if said else []
    for name in dict.fromkeys(name for name in gaps if name.isupper()):
        values = _values(file, name)
        parts += [f"‹{name}› is {values}"] if values else []
    return "; ".join(parts)


def _and(said: list[str]) -> str:
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((SOURCES / file).read_text(encoding="utf-8"))


def _defaults(file: str, line: int) -> dict[str, str]:
    """Setting -> "usually ...", where it has a default; those nearest to the line count first."""
    nodes = [one for one in ast.walk(_tree(file)) if isinstance(one, ast.ClassDef | ast.FunctionDef)]
    nodes.sort(key=lambda one: (not one.lineno <= line <= (one.end_lineno or 0), -one.lineno))
    found: dict[str, str] = {}
    for node in nodes:
        for name, default in _settings(node):
            if default is not None and ast.unparse(default) != "None":
                found.setdefault(name, f"usually `{ast.unparse(default)}`")
    return found


def _settings(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, ast.expr | None]]:
    """The arguments of a function or the fields of a class, with what they are if nothing is said."""
    if isinstance(node, ast.ClassDef):
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                yield one.target.id, one.value if isinstance(one.value, ast.Constant | ast.UnaryOp) else None
        return
    arguments = node.args
    placed = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(placed) - len(arguments.defaults)), *arguments.defaults]
    for argument, default in [*zip(placed, defaults, strict=True), *_by_name(arguments)]:
        yield argument.arg, default


def _by_name(arguments: ast.arguments) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    return zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)


def _values(file: str, name: str) -> str:
    """What a name in capitals stands for in that module; empty where it is no short list or number."""
    dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = importlib.import_module(f"distcomp.{dotted}")
    value = getattr(module, name, getattr(module, f"_{name}", None))
    if isinstance(value, int | float | str):
        return f"`{value!r}`" if isinstance(value, str) else f"{value}"
    if isinstance(value, dict | tuple | list | set | frozenset) and 0 < len(value) <= MOST_VALUES:
        return ", ".join(f"`{one}`" for one in value)
    return ""
