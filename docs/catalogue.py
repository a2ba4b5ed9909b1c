"""A page per method and one that lists them: read from the registry, as the shell and the tests do, and from
the committed results of the benchmarks."""

from collections.abc import Iterator
from pathlib import Path

from evidence import Row, evidence

from distcomp.cli.methods import kept_per_parameter
from distcomp.registry import METHODS, Entry, load_all

load_all()  # every method registers itself when its room is imported

HEAD = """\
# Methods

Every method by the name that `distcomp.attach` and `--method` take; `distcomp methods` prints the same list.
*d* is the number of parameters, *n* the number of ranks, and bytes are those that one rank sends per step;
what it keeps in memory between steps (residuals, momenta, anchors, replicas) is counted from the state that
the method declares, for a matrix of 1000 x 1000 and 4 ranks at default settings.

| method | what it does | bytes sent per step and rank | bytes kept per parameter |
|---|---|---|---|
"""
KINDS = {
    "gradient": "gradients, every step",
    "periodic": "models, every few steps",
    "gossip": "models, with neighbours only",
    "predictions": "predictions of shared examples, every few steps",
}


def pages() -> dict[str, str]:
    """Path under ``docs`` -> Markdown."""
    measured = list(evidence())
    return {"methods.md": index()} | {
        f"methods/{name}.md": page(entry, [row for method, row in measured if method == name])
        for name, entry in METHODS.items()
    }


def index() -> str:
    """The list of all methods."""
    names = sorted(METHODS)
    table = "\n".join(_row(METHODS[name]) for name in names)
    tree = "\n".join(f"methods/{name}" for name in names)
    return f"{HEAD}{table}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def page(entry: Entry, measured: list[Row]) -> str:
    """One method: what is known of it, what its recipe says, and what was measured."""
    told = "\n\n".join(_prose(paragraph) for paragraph in entry.doc)
    rows = [f"| {' | '.join(row)} |" for row in measured]
    table = ["| run | measured | result file |", "|---|---|---|", *rows] if rows else [NOTHING]
    return "\n".join([f"# {entry.name}", "", *_facts(entry), "", told, "", "## Measured", "", *table, ""])


NOTHING = "Nothing yet: no result file of the benchmarks has a row of it."


def write(docs: Path) -> None:
    """Write the pages that changed, so that the others are not built again; take away what is no method."""
    made = pages()
    for path in (docs / "methods").glob("*.md"):
        if f"methods/{path.name}" not in made:
            path.unlink()
    (docs / "methods").mkdir(exist_ok=True)
    for name, text in made.items():
        path = docs / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _row(entry: Entry) -> str:
    cells = (f"[`{entry.name}`](methods/{entry.name}.md)", _prose(entry.summary), _prose(entry.wire))
    cells += (_kept(entry).removesuffix(" bytes per parameter"),)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _facts(entry: Entry) -> Iterator[str]:
    settings = ", ".join(f"`{name}={value}`" for name, value in entry.parameters.items())
    control = " (a control, not a method to train with)" if entry.control else ""
    yield f"* Paper: {_prose(entry.paper)}"
    yield f"* Differs from it: {_prose(entry.deviations)}"
    yield f"* Agrees on: {KINDS[entry.kind]}{control}"
    yield f"* Sends, per step and rank: {_prose(entry.wire)} bytes"
    yield f"* Keeps in memory, per rank: {_kept(entry)}"
    yield f"* Payloads are {'' if entry.summable else 'not '}added on the wire"
    yield f"* {'Biased' if entry.biased else 'Unbiased'}"
    yield f"* Fails: {_prose(entry.limitations)}"
    yield f"* Settings and their defaults: {settings or 'none'}"


def _kept(entry: Entry) -> str:
    """From the state that the method declares; of a matrix of 1000 x 1000 among 4 ranks, default settings."""
    nbytes = kept_per_parameter(entry.name)
    return "as its settings say" if nbytes is None else f"{nbytes:.4g} bytes per parameter"


def _prose(text: str) -> str:
    """reStructuredText as Markdown: code keeps its signs, and elsewhere a sign is only a sign."""
    text = text.replace("``", "`").replace(":class:", "").replace(":func:", "")
    parts = text.split("`")
    return "`".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    for sign in ("*", "_", "<", "$"):
        text = text.replace(sign, "\\" + sign)
    return text
