"""``distcomp methods``: every method and compressor, and what is known of it without running it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from distcomp.builtin_hooks import BUILTIN_HOOKS, is_builtin, parse_builtin
from distcomp.cli.plugins import add_import, import_plugins
from distcomp.errors import DistcompError
from distcomp.plugins import load_plugins

HOOK_SUMMARIES = {hook.name: hook.summary for hook in BUILTIN_HOOKS.values()}
EXAMPLE_SIDE = 1000


def add(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "methods",
        help="list every method and compressor",
        description="List every method and compressor: settings, bytes on the wire, paper.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one only")
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print them all, or one."""
    import_plugins(arguments)
    if arguments.name is not None:
        return _show(arguments.name, arguments.json)
    if arguments.json:
        listed = {"methods": list(methods()), "compressors": list(compressors()), "hooks": HOOK_SUMMARIES}
        print(json.dumps(listed, indent=2))
        return 0
    width = min(shutil.get_terminal_size().columns, 100)
    heading = "Methods, by the name that attach() and --method take (d parameters, n ranks)"
    print(f"{textwrap.fill(heading, width)}\n")
    for one in methods():
        print(_paragraph(one, width))
    print("Compressors, which methods carry\n")
    for one in compressors():
        print(_paragraph(one, width))
    print("PyTorch's own, for comparison\n")
    for name, law in HOOK_SUMMARIES.items():
        print(_wrapped(name, law, width))
    return 0


def check(method: str) -> None:
    """Raise DistcompError unless ``method`` names a method that can be attached."""
    from distcomp.methods import parse

    if is_builtin(method):
        parse_builtin(method)
        return
    name = method.partition(":")[0].strip()
    if name not in _names():
        raise DistcompError(f"there is no method {name!r}; {_close(name)}{_OWN}")
    parse(method)


_OWN = "distcomp methods lists all, and --import FILE.py brings one of your own"


def _names() -> list[str]:
    """Of all methods, those of plugins and PyTorch's own among them."""
    from distcomp.registry import METHODS, load_all

    load_all()
    load_plugins()
    return [*METHODS, *HOOK_SUMMARIES]


def _close(name: str) -> str:
    close = difflib.get_close_matches(name, _names(), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _show(name: str, as_json: bool) -> int:
    """One method or compressor, whatever settings stand behind its name."""
    _names()
    plain = name.partition(":")[0]
    found = [one for one in (*methods(), *compressors()) if one["name"] == plain]
    if name in HOOK_SUMMARIES:
        found = [{"name": name, "summary": HOOK_SUMMARIES[name], "settings": {}}]
    if not found:
        raise DistcompError(f"there is no method {name!r}; {_close(plain)}{_OWN}")
    width = min(shutil.get_terminal_size().columns, 100)
    print(json.dumps(found[0], indent=2) if as_json else _paragraph(found[0], width).rstrip("\n"))
    return 0


def methods() -> Iterator[dict[str, Any]]:
    """Each registered method."""
    from distcomp.registry import METHODS, load_all

    load_all()
    for name, entry in sorted(METHODS.items()):
        yield {
            "name": name,
            "summary": entry.summary,
            "settings": {key: _plain(value) for key, value in entry.parameters.items()},
            "wire": entry.wire,
            "paper": entry.paper,
            "summable": entry.summable,
            "biased": entry.biased,
            "differs": entry.deviations,
            "fails": entry.limitations,
            "kind": entry.kind,
            "control": entry.control,
            "state_bytes_per_parameter": kept_per_parameter(name),
        }


def kept_per_parameter(name: str) -> float | None:
    """What a method keeps between steps with default settings, in bytes for each parameter; None where it has
    no default for a setting."""
    from distcomp.advice.memory import bytes_per_parameter

    try:
        return bytes_per_parameter(name)
    except DistcompError:
        return None


def compressors() -> Iterator[dict[str, Any]]:
    """Each public compressor. ``bits_per_value``: of a matrix of 1000 x 1000, default settings."""
    from distcomp.layout import Layout

    layout = Layout.of([("matrix", (EXAMPLE_SIDE, EXAMPLE_SIDE))])
    for name, kind in _compressor_classes():
        settings = _settings(kind)
        known: dict[str, Any] = {"name": name, "summary": _first_sentence(kind), "settings": settings}
        if inspect.signature(kind).parameters.keys() <= _defaults(kind):
            default = kind()
            bits = 8 * default.wire_bytes(layout) / layout.numel
            known |= {"summable": default.summable, "biased": not default.unbiased, "bits_per_value": bits}
        yield known


def _compressor_classes() -> Iterator[tuple[str, Any]]:
    """Ours by their class's name; then those of plugins, by the name that they registered."""
    from distcomp import compressors as room
    from distcomp.registry import COMPRESSORS

    ours = [(name, getattr(room, name)) for name in room.__all__]
    ours = [(name, kind) for name, kind in ours if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]
    yield from ((name, kind) for name, kind in ours if issubclass(kind, room.Compressor))
    for name, entry in sorted(COMPRESSORS.items()):
        if inspect.isclass(entry.make) and not entry.make.__module__.startswith("distcomp."):
            yield name, entry.make


def _defaults(kind: Any) -> set[str]:
    """The settings that may be left out."""
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty}


def _settings(kind: Any) -> dict[str, Any]:
    fields = dataclasses.fields(kind)
    return {
        field.name: None if field.default is dataclasses.MISSING else _plain(field.default)
        for field in fields
    }


def _first_sentence(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _paragraph(one: dict[str, Any], width: int) -> str:
    """A name, what it does, and its particulars below."""
    settings = ", ".join(f"{key}={value}" for key, value in one["settings"].items())
    traits = [f"kind: {one['kind']}"] if one.get("kind", "gradient") != "gradient" else []
    if "summable" in one:
        traits.append("added on the wire" if one["summable"] else "not added on the wire")
        traits.append("biased" if one["biased"] else "unbiased")
    if one.get("control"):
        traits.append("a control, not a method to train with")
    particulars = {
        "settings": settings or "none",
        "sends": one.get("wire") or (f"{one['bits_per_value']:.4g} bits per value" if traits else ""),
        "keeps": _kept(one.get("state_bytes_per_parameter")),
        "is": ", ".join(traits),
        "paper": one.get("paper", ""),
        "differs": one.get("differs", ""),
        "fails": one.get("fails", ""),
    }
    lines = [_wrapped(one["name"], one["summary"], width)]
    lines += [_wrapped(f"    {key}", text, width) for key, text in particulars.items() if text]
    return "\n".join(lines) + "\n"


def _kept(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes:.4g} bytes per parameter in memory"


def _wrapped(name: str, text: str, width: int) -> str:
    return textwrap.fill(text, width, initial_indent=f"{name:<13} ", subsequent_indent=" " * 14)
