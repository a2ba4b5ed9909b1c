"""The page that lists every method: read from the registry, as the shell and the tests do."""

from collections.abc import Iterator
from pathlib import Path

from distcomp.methods.registry import METHODS, Entry

HEAD = """\
# Methods

Every method by the name that `distcomp.attach` and `--method` take; `distcomp methods` prints the same list.
*d* is the number of parameters, *n* the number of ranks, and bytes are those that one rank sends per step.

| method | what it does | bytes sent per step and rank |
|---|---|---|
"""
KINDS = {
    "gradient": "gradients, every step",
    "periodic": "models, every few steps",
    "gossip": "models, with neighbours only",
}


def page(methods: dict[str, Entry] | None = None) -> str:
    """The page in Markdown."""
    entries = [entry for _, entry in sorted((METHODS if methods is None else methods).items())]
    table = "\n".join(_row(entry) for entry in entries)
    sections = "\n".join(_section(entry) for entry in entries)
    return f"{HEAD}{table}\n\n{sections}"


def write(path: Path) -> None:
    """Write the page where it changed, so that an unchanged one is not built again."""
    text = page()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _row(entry: Entry) -> str:
    cells = (f"[`{entry.name}`](#{_anchor(entry)})", _prose(entry.law), _prose(entry.wire))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _section(entry: Entry) -> str:
    return "\n".join(
        [f"({_anchor(entry)})=", f"## {entry.name}", "", _prose(entry.law), "", *_facts(entry), ""]
    )


def _facts(entry: Entry) -> Iterator[str]:
    settings = ", ".join(f"`{name}={value}`" for name, value in entry.parameters.items())
    control = " (a control, not a method to train with)" if entry.control else ""
    yield f"* Agrees on: {KINDS[entry.kind]}{control}"
    yield f"* Settings and their defaults: {settings or 'none'}"
    yield f"* Sends: {_prose(entry.wire)} bytes"
    yield f"* Payloads are {'' if entry.summable else 'not '}added on the wire"
    yield f"* {'Biased' if entry.biased else 'Unbiased'}"
    yield f"* Paper: {_prose(entry.paper)}"
    yield f"* Differs from it: {_prose(entry.differs)}"


def _anchor(entry: Entry) -> str:
    return f"method-{entry.name.replace('_', '-')}"


def _prose(text: str) -> str:
    """reStructuredText as Markdown: code keeps its signs, and elsewhere a sign is only a sign."""
    text = text.replace("``", "`").replace(":class:", "").replace(":func:", "")
    parts = text.split("`")
    return "`".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    for sign in ("*", "_", "<", "$"):
        text = text.replace(sign, "\\" + sign)
    return text
