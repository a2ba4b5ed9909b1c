"""A page per method and one that lists them: read from the registry, as the shell and the tests do, and from
the committed results of the benchmarks."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from distcomp.errors import DistcompError
from distcomp.methods import parse
from distcomp.registry import METHODS, Entry, load_all

load_all()  # every method registers itself when its room is imported

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

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
GOSSIP = {"D-PSGD": "dpsgd", "DCD": "dcd", "ECD": "ecd", "CHOCO": "choco", "DeepSqueeze": "deepsqueeze"}

Row = tuple[str, str, str]
"""What was run, what was measured, and the result file that says so."""


def pages() -> dict[str, str]:
    """Path under ``docs`` -> Markdown."""
    measured = list(evidence())
    told = {method for method, _ in measured}
    measured += [(method, row) for method, row in mentions() if method not in told]
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


def evidence() -> Iterator[tuple[str, Row]]:
    """(method, row) for each figure of a method in the benchmarks' results."""
    for path in sorted(RESULTS.glob("step_*.json")):
        found = json.loads(path.read_text())
        megabytes = found["gradient_bytes"] / 1e6
        where = f"exchange of {megabytes:.1f} MB, {found['ranks']} ranks, {found['rate']}"
        ddp = found["methods"]["ddp"]
        for spec, row in found["methods"].items():
            faster = ddp["exchange_s"] / row["exchange_s"]
            text = f"{1000 * row['exchange_s']:.0f} ms, {faster:.1f} × as fast as DDP; "
            text += f"{ddp['payload_bytes'] / row['payload_bytes']:.1f} × fewer bytes"
            yield from _told(spec, where, text, path)
    yield from _losses(RESULTS / "digit_pairs.json")
    yield from _seconds()
    yield from _accuracies(RESULTS / "decentralized_table.json")


def mentions() -> Iterator[tuple[str, Row]]:
    """(method, row) for each result file that has something of a method, alone or within another, under the
    text that names it there."""
    for path in sorted(RESULTS.glob("*.json")):
        texts: dict[str, str] = {}
        for text in _strings(json.loads(path.read_text())):
            for part in text.split(" | "):
                for name in _named(part.strip()):
                    texts.setdefault(name, part.strip())
        for name, text in texts.items():
            yield name, (f"`{text}`", "see the file, and the page that shows it", f"`{path.name}`")


def _strings(found: object) -> Iterator[str]:
    """All keys and texts, however deep."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict):
        for key, value in found.items():
            yield key
            yield from _strings(value)
    elif isinstance(found, list):
        for value in found:
            yield from _strings(value)


@cache
def _named(text: str) -> tuple[str, ...]:
    """The methods in a text that ``parse`` takes for one: its own name, and those in its settings."""
    if not re.match(r"[a-z]\w*(:|$)", text) or len(text) > 300:
        return ()
    try:
        parse(text)
    except DistcompError:
        return ()
    return tuple(name for name in dict.fromkeys(re.findall(r"[a-z]\w*", text)) if name in METHODS)


def _losses(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    ddp = found["methods"]["ddp"]["mean"]
    where = f"test loss, {found['ranks']} ranks, {found['steps']} steps, {found['seeds']} seeds"
    for spec, row in found["methods"].items():
        if spec != "ddp":
            off, spread = row["paired_difference_mean"] / ddp, row["paired_difference_spread"] / ddp
            yield from _told(spec, where, f"{off:+.1%} ± {100 * spread:.1f} against DDP", path)


def _seconds() -> Iterator[tuple[str, Row]]:
    specs = json.loads((RESULTS / "averaging_steps.json").read_text())["methods"]
    for path in sorted(RESULTS.glob("averaging_time_*.json")):
        found = json.loads(path.read_text())
        where = f"seconds to a test loss of {found['target']}, {found['ranks']} ranks, {found['rate']}"
        for label, row in found["methods"].items():
            if row.get("seconds_to_target") and specs.get(label, {}).get("spec"):
                text = f"{row['seconds_to_target']:.1f} s, {row['speed_up']:.1f} × as fast as fp32"
                yield from _told(specs[label]["spec"], f"{where}, delay {found['delay']}", text, path)


def _accuracies(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    best = found["table"]["all-reduce | fp32"]["test_accuracy"]
    plan = found["plan"]
    for label, row in found["table"].items():
        family, _, variant = label.partition(" | ")
        if family in GOSSIP:
            reached = "diverged" if row["diverged"] else f"{row['test_accuracy']:.1%}"
            text = f"{reached}, all-reduce {best:.1%}"
            where = f"test accuracy, {plan['workers']} workers, {plan['topology']}, {plan['steps']} steps"
            yield GOSSIP[family], (f"{variant}: {where}", text, f"`{path.name}`")


def _told(spec: str, where: str, text: str, path: Path) -> Iterator[tuple[str, Row]]:
    """A row of a registered method; others, such as PyTorch's own hooks, have no page."""
    try:
        parse(spec)
    except DistcompError:
        return
    yield spec.partition(":")[0], (f"`{spec}`: {where}", text, f"`{path.name}`")


def _row(entry: Entry) -> str:
    cells = (f"[`{entry.name}`](methods/{entry.name}.md)", _prose(entry.summary), _prose(entry.wire))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _facts(entry: Entry) -> Iterator[str]:
    settings = ", ".join(f"`{name}={value}`" for name, value in entry.parameters.items())
    control = " (a control, not a method to train with)" if entry.control else ""
    yield f"* Paper: {_prose(entry.paper)}"
    yield f"* Differs from it: {_prose(entry.deviations)}"
    yield f"* Agrees on: {KINDS[entry.kind]}{control}"
    yield f"* Sends, per step and rank: {_prose(entry.wire)} bytes"
    yield f"* Payloads are {'' if entry.summable else 'not '}added on the wire"
    yield f"* {'Biased' if entry.biased else 'Unbiased'}"
    yield f"* Fails: {_prose(entry.limitations)}"
    yield f"* Settings and their defaults: {settings or 'none'}"


def _prose(text: str) -> str:
    """reStructuredText as Markdown: code keeps its signs, and elsewhere a sign is only a sign."""
    text = text.replace("``", "`").replace(":class:", "").replace(":func:", "")
    parts = text.split("`")
    return "`".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    for sign in ("*", "_", "<", "$"):
        text = text.replace(sign, "\\" + sign)
    return text
