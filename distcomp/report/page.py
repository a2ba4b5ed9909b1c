"""One page that holds everything it shows: no script, style, font or picture from anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from html import escape
from importlib import resources
from string import Template
from typing import Any

from distcomp.recording import Run
from distcomp.report import svg, words
from distcomp.report.bars import stacked
from distcomp.report.charts import Prices, charts, unread
from distcomp.report.claims import verdict
from distcomp.report.closer import bytes_by_kind, closer_section, legend
from distcomp.report.exports import as_csv, figure
from distcomp.report.figures import BASELINE, CONTROLS, Comparison, MethodRow
from distcomp.report.predicted import Predicted, pairs_of, section
from distcomp.report.table import Column, columns

NO_CHARTS = '<p class="aside">No evaluation was recorded.</p>'
RINGS = "A ring marks the evaluation at which a method first meets the target."
PARTS = {
    "compute": "forward, backward and whatever else the step did",
    "encode": "compressing, not hidden behind backward",
    "recode": "decoding, adding up and compressing again between two rounds",
    "wait": "waiting for the network",
    "decode": "decompressing",
}


def page(comparison: Comparison, predicted: Predicted | None = None, prices: Prices | None = None) -> str:
    """The report as one HTML document; with what was ``predicted`` of steps, and with losses against what
    they cost, where these are given."""
    folder = resources.files("distcomp.report")
    template = Template((folder / "page.html").read_text(encoding="utf-8"))
    claim = verdict(comparison)
    return template.substitute(
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        title=escape(claim.sentence),
        setting=escape(_setting(comparison)),
        tiles="".join(_tiles(comparison, claim.winner)),
        table=_table(comparison, claim.winner),
        legend="".join(_legend(comparison)),
        charts="".join(charts(comparison, prices)) or NO_CHARTS,
        kinds=bytes_by_kind(comparison),
        closer=closer_section(comparison),
        unread=unread(comparison),
        time=_time(comparison),
        predicted=section(pairs_of(comparison, predicted)) if predicted is not None else "",
        meaning=escape(" ".join(filter(None, (column.meaning for column in columns(comparison))))),
        bytes=_bytes(comparison),
        rings=RINGS if comparison.target_loss is not None else "",
        environment="".join(_environment(comparison)),
    )


def _setting(comparison: Comparison) -> str:
    """What ran, on how many ranks, over which network, and whether that was one."""
    about = comparison.runs[0].about
    script = " ".join(about.get("argv") or []) or "a training script"
    network = about.get("network")
    if not network:
        return f"{script}, {about.get('ranks') or 'an unknown number of'} ranks, on the network as it is"
    real = "real packets" if network.get("real") else "simulated: these are not real packets"
    return f"{script}, {network.get('asked')}, {real}"


def _tiles(comparison: Comparison, best: MethodRow | None) -> Iterator[str]:
    """The three figures that matter, of the method that won beside the baseline."""
    base = comparison.baseline
    if best is None or base is None or best.to_target_s is None or base.to_target_s is None:
        return
    target = words.formatted(comparison.target_loss or 0.0, words.loss)
    yield _tile(
        f"Training time to a test loss of {target}",
        words.formatted(best.to_target_s.mean, words.seconds),
        f"DDP: {words.formatted(base.to_target_s.mean, words.seconds)}",
    )
    for title, name, write in (
        ("Sent on the wire by each worker in a step", "wire_bytes", words.size),
        ("Payload of each worker in a step", "payload_bytes", words.size),
        ("Test accuracy at the end", "test_accuracy", words.percent),
    ):
        mine, its = best.spread(name), base.spread(name)
        if (
            mine is not None
            and its is not None
            and not (name == "payload_bytes" and best.spread("wire_bytes"))
        ):
            yield _tile(title, words.formatted(mine.mean, write), f"DDP: {words.formatted(its.mean, write)}")


def _tile(title: str, value: str, beside: str) -> str:
    return (
        f'<div class="tile"><div class="tile-title">{escape(title)}</div>'
        f'<div class="tile-value">{escape(value)}</div><div class="tile-beside">{escape(beside)}</div></div>'
    )


def _table(comparison: Comparison, winner: MethodRow | None) -> str:
    head = "".join(
        f'<th scope="col">{escape(_heading(column.heading))}</th>' for column in columns(comparison)
    )
    body = "".join(_table_row(comparison, style, row, winner) for style, row in enumerate(comparison.rows))
    head = f'<tr><th scope="col">method</th>{head}</tr>'
    return f'<table class="methods"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _heading(lines: tuple[str, str]) -> str:
    """Two lines, or one word that needs no break."""
    first, second = lines
    return first + second if first.endswith("-") else f"{first}\n{second}"


def _table_row(comparison: Comparison, style: int, row: MethodRow, winner: MethodRow | None) -> str:
    cells = "".join(_cell(column, row) for column in columns(comparison))
    best = " best" if row is winner else ""
    return (
        f'<tr class="row{best}" data-style="{style}"><th scope="row"><div>{svg.swatch(style)}'
        f"<span>{_breakable(row.method)}{_role(row)}</span></div></th>{cells}</tr>"
    )


def _cell(column: Column, row: MethodRow) -> str:
    """A figure; its spread below it in small print, where there is one."""
    label = escape(_heading(column.heading).replace("\n", " "))
    kind = "speed-up" if column.heading == ("speed-", "up") else "figure"
    mean, plus_minus, rest = escape(column.cell(row)).partition(" ±")
    return f'<td class="{kind}" data-label="{label}">{mean}{plus_minus and f"<small> ±{rest}</small>"}</td>'


def _breakable(text: str) -> str:
    """A method's name, which may be long, broken after a colon or a comma if it must be."""
    return escape(text).replace(":", ":<wbr>").replace(",", ",<wbr>")


def _role(row: MethodRow) -> str:
    role = "baseline" if row.method == BASELINE else "control" if row.method in CONTROLS else ""
    several = f"{len(row.runs)} runs" if len(row.runs) > 1 else ""
    note = ", ".join(filter(None, (role, several)))
    return f" <small>{note}</small>" if note else ""


def _legend(comparison: Comparison) -> Iterator[str]:
    for style, row in enumerate(comparison.rows):
        label = _breakable(row.method)
        state = f'type="button" data-style="{style}" aria-pressed="false"'
        yield f"<button {state}>{svg.swatch(style)}<span>{label}</span></button>"


def _time(comparison: Comparison) -> str:
    """A bar per method, as long as its mean step; the parts of it in the order in which they happen."""
    split = {row.method: parts for row in comparison.rows if (parts := row.spent_s()) is not None}
    if not any(sum(parts.values()) for parts in split.values()):
        return '<p class="aside">The record of these runs holds no phases.</p>'
    rows = [(name, {part: max(parts[part], 0.0) for part in PARTS}) for name, parts in split.items()]
    title = "The mean step of rank 0"

    def draw(width: int, height: int, key: str) -> str:
        return stacked(rows, {part: part for part in PARTS}, _seconds, title, width)

    numbers = as_csv(["method", *PARTS], ([name, *parts.values()] for name, parts in rows))
    after = legend({part: part for part in PARTS}, PARTS) + _time_told(comparison, split)
    return figure(title, draw, "time", numbers, after=after, full=True)


def _time_told(comparison: Comparison, split: Mapping[str, Mapping[str, float]]) -> str:
    """The same in words, and what the first step took more."""
    lines = []
    for row in comparison.rows:
        if row.method not in split:
            parts = ["not split: the record lacks phases, or they overlap"]
        else:
            found = split[row.method]
            parts = [f"{part} {_seconds(found[part])}" for part in PARTS if found[part]]
        told = " · ".join([*parts, *_starting_told(row)])
        lines.append(f"<div><dt>{_breakable(row.method)}</dt><dd>{escape(told)}</dd></div>")
    return f"<details><summary>In numbers</summary><dl>{''.join(lines)}</dl></details>"


def _seconds(value: float) -> str:
    return words.formatted(value, words.seconds)


def _starting_told(row: MethodRow) -> list[str]:
    seconds = row.spread("starting_s")
    return (
        []
        if seconds is None
        else [f"the first step took {_seconds(seconds.mean)} more, which counts nowhere"]
    )


def _bytes(comparison: Comparison) -> str:
    """What arithmetic says must cross the wire, beside what the kernel counted."""
    rows = [(row, row.spread("predicted_wire_bytes"), row.spread("wire_bytes")) for row in comparison.rows]
    lines = [
        f"<tr><th scope='row'>{_breakable(row.method)}</th>"
        f"<td>{words.formatted(predicted.mean, words.size)}</td>"
        f"<td>{words.formatted(counted.mean, words.size)}</td>"
        f"<td>{100 * (counted.mean / predicted.mean - 1):+.1f} %</td></tr>"
        for row, predicted, counted in rows
        if predicted is not None and counted is not None and predicted.mean
    ]
    if not lines:
        return ""
    head = "".join(
        f"<th scope='col'>{text}</th>" for text in ("method", "predicted", "counted", "difference")
    )
    table = f"<table class='plain'><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<details><summary>Bytes on the wire, predicted and counted</summary>{table}</details>"


def _environment(comparison: Comparison) -> Iterator[str]:
    """What a reader needs to repeat this, and what to hold against it."""
    runs = comparison.runs
    about = partial(_told, runs)
    network: dict[str, Any] = dict(runs[0].about.get("network") or {})
    rows = [
        ("Network asked for", network.get("asked")),
        ("Network achieved", about(lambda run: (run.about.get("network") or {}).get("achieved"))),
        ("Packets", network.get("packets")),
        ("Processor", about(lambda run: (run.about.get("host") or {}).get("cpu"))),
        ("Cores", about(lambda run: (run.about.get("host") or {}).get("cores"))),
        ("System", about(lambda run: (run.about.get("host") or {}).get("system"))),
        ("torch", about(lambda run: (run.about.get("versions") or {}).get("torch"))),
        ("Python", about(lambda run: (run.about.get("versions") or {}).get("python"))),
        ("distcomp", about(lambda run: (run.about.get("versions") or {}).get("distcomp"))),
        ("Commit", about(lambda run: run.about.get("commit"))),
        ("Seed", about(lambda run: run.about.get("seed"))),
        ("Command", about(lambda run: " ".join(run.about.get("argv") or []))),
        ("Started", about(lambda run: run.about.get("started"))),
        ("Steps", ", ".join(sorted({str(run_.steps) for row in comparison.rows for run_ in row.runs}))),
        (
            "Did not finish",
            ", ".join(run.directory.name for run in runs if run.about.get("exit_status")) or None,
        ),
    ]
    for title, text in rows:
        if text not in (None, ""):
            yield f"<div><dt>{escape(title)}</dt><dd>{escape(str(text))}</dd></div>"


def _told(runs: tuple[Run, ...], tell: Any) -> str:
    """The same for all runs: once. Otherwise each of the different answers."""
    answers = [str(answer) for answer in map(tell, runs) if answer not in (None, "")]
    return "; ".join(dict.fromkeys(answers))
