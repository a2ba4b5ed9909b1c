"""One page that holds everything it shows: no script, style, font or picture from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from html import escape
from importlib import resources
from string import Template
from typing import Any

from distcomp.recording import Run
from distcomp.report import svg, words
from distcomp.report.claims import verdict
from distcomp.report.figures import BASELINE, CONTROLS, Comparison, MethodRow
from distcomp.report.predicted import Predicted, pairs_of, section
from distcomp.report.table import Column, columns

WIDE, NARROW = (540, 320), (358, 270)
NO_CHARTS = '<p class="aside">No evaluation was recorded.</p>'
RINGS = "A ring marks the evaluation at which a method first meets the target."
MOST_OTHERS = 8
"""So many of what a script logged under names of its own are drawn; the rest is named."""
PARTS = {
    "compute": "forward, backward and whatever else the step did",
    "encode": "compressing, not hidden behind backward",
    "recode": "decoding, adding up and compressing again between two rounds",
    "wait": "waiting for the network",
    "decode": "decompressing",
}


def page(comparison: Comparison, predicted: Predicted | None = None) -> str:
    """The report as one HTML document; with what was ``predicted`` of steps, where that is given."""
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
        charts="".join([*_charts(comparison), *_other_charts(comparison)]) or NO_CHARTS,
        unread=_unread(comparison),
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
    for title, figure, write in (
        ("Sent on the wire by each worker in a step", "wire_bytes", words.size),
        ("Payload of each worker in a step", "payload_bytes", words.size),
        ("Test accuracy at the end", "test_accuracy", words.percent),
    ):
        mine, its = best.spread(figure), base.spread(figure)
        if (
            mine is not None
            and its is not None
            and not (figure == "payload_bytes" and best.spread("wire_bytes"))
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


def _charts(comparison: Comparison) -> Iterator[str]:
    """Accuracy and loss, each against seconds and against bytes; pruned weights against seconds."""
    axes = (("train_s", "seconds of training"), ("sent_bytes", "bytes sent by each worker (logarithmic)"))
    shown = (("test_accuracy", "Test accuracy", axes), ("test_loss", "Test loss", axes))
    for figure, what, overs in (*shown, ("pruned", "Share of pruned weights", axes[:1])):
        for over, label in overs:
            chart = _chart(comparison, figure, over, f"{what} against {label.partition(' (')[0]}", label)
            if chart is not None:
                key = f"{figure}-{over}"
                wide = f'<div class="wide">{chart.draw(*WIDE, key + "-wide")}</div>'
                narrow = f'<div class="narrow">{chart.draw(*NARROW, key)}</div>'
                silent = _silent(comparison) if over == "sent_bytes" else ""
                dotted = (
                    ""
                    if chart.level is None
                    else f" <small>dotted: {words.formatted(chart.level, words.loss)}</small>"
                )
                caption = f"<figcaption>{escape(chart.title)}{dotted}</figcaption>"
                yield f"<figure>{caption}{wide}{narrow}{silent}</figure>"


def _other_charts(comparison: Comparison) -> Iterator[str]:
    """What a script logged under names of its own, against seconds."""
    for at, name in enumerate(other_names(comparison)[:MOST_OTHERS]):
        lines = [
            svg.Line(style, _label(row, run.seed), points)
            for style, row in enumerate(comparison.rows)
            for run in row.runs
            if (points := _other_points(run.curve, name))
        ]
        if not lines:
            continue
        x = svg.span([x for line in lines for x, _ in line.points], _short, zero=True)
        y = svg.span([y for line in lines for _, y in line.points], _short)
        chart = svg.Chart(tuple(lines), x, y, "seconds of training", f"{name} against seconds of training")
        wide = f'<div class="wide">{chart.draw(*WIDE, f"other{at}-wide")}</div>'
        narrow = f'<div class="narrow">{chart.draw(*NARROW, f"other{at}")}</div>'
        yield f"<figure><figcaption>{escape(chart.title)}</figcaption>{wide}{narrow}</figure>"


def _other_points(curve: Any, name: str) -> tuple[tuple[float, float], ...]:
    points = ((point.train_s, point.others.get(name)) for point in curve)
    return tuple((x, y) for x, y in points if y is not None and math.isfinite(y))


def other_names(comparison: Comparison) -> list[str]:
    """Numbers that were logged under names of the script's own, in the order in which they came."""
    points = (point for row in comparison.rows for run in row.runs for point in run.curve)
    return list(dict.fromkeys(name for point in points for name in point.others))


def _unread(comparison: Comparison) -> str:
    """What was logged and is not drawn, by its name."""
    names = [*other_names(comparison)[MOST_OTHERS:]]
    names += [name for row in comparison.rows for run in row.runs for name in run.unread]
    return f"Logged and not drawn: {escape(', '.join(dict.fromkeys(names)))}." if names else ""


def _chart(comparison: Comparison, figure: str, over: str, title: str, label: str) -> svg.Chart | None:
    lines = [
        svg.Line(style, _label(row, run.seed), points)
        for style, row in enumerate(comparison.rows)
        for run in row.runs
        if (points := _points(run.curve, over, figure))
    ]
    if not lines:
        return None
    log, loss = over == "sent_bytes", figure == "test_loss"
    target = comparison.target_loss if loss else None
    x = svg.span([x for line in lines for x, _ in line.points], _short_size if log else _short, log, not log)
    every = [y for line in lines for _, y in line.points]
    values = [y for y in every if not loss or y <= _ceiling(comparison)] or every
    y = svg.span([*values, *([target] if target is not None else [])], _short if loss else _whole_percent)
    rings = tuple(_rings(comparison, over)) if loss else ()
    return svg.Chart(tuple(lines), x, y, label, title, target, rings)


def _points(curve: Any, over: str, figure: str) -> tuple[tuple[float, float], ...]:
    points = ((getattr(point, over), getattr(point, figure)) for point in curve)
    return tuple(
        (x, y) for x, y in points if y is not None and math.isfinite(y) and (over == "train_s" or x > 0)
    )


def _ceiling(comparison: Comparison) -> float:
    """The highest loss worth showing: where training starts. What diverges leaves the picture."""
    first = [
        run.curve[0].test_loss
        for row in comparison.rows
        for run in row.runs
        if run.curve and run.curve[0].test_loss
    ]
    return max((loss for loss in first if math.isfinite(loss)), default=math.inf)


def _rings(comparison: Comparison, over: str) -> Iterator[tuple[int, float, float]]:
    for style, row in enumerate(comparison.rows):
        for run in row.runs:
            point = None if comparison.target_loss is None else run.reached(comparison.target_loss)
            if point is not None and point.test_loss is not None and getattr(point, over) > 0:
                yield style, getattr(point, over), point.test_loss


def _label(row: MethodRow, seed: object) -> str:
    return row.method if len(row.runs) == 1 else f"{row.method}, seed {seed}"


def _silent(comparison: Comparison) -> str:
    """Who is not in a picture of bytes, having sent none."""
    silent = [row.method for row in comparison.rows if all(run.payload_bytes == 0 for run in row.runs)]
    return (
        f'<p class="aside">Not shown: {escape(", ".join(silent))}, which sends nothing.</p>' if silent else ""
    )


def _short_size(nbytes: float) -> str:
    return words.formatted(nbytes, words.size).replace(".00 ", " ").replace(".0 ", " ")


def _short(value: float) -> str:
    return f"{value:g}"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(comparison: Comparison) -> str:
    """A bar per method, as long as its mean step; the parts of it in the order in which they happen."""
    split = {row.method: row.spent_s() for row in comparison.rows}
    longest = max((sum(parts.values()) for parts in split.values() if parts), default=0.0)
    if not longest:
        return '<p class="aside">The record of these runs holds no phases.</p>'
    key = "".join(
        f'<span title="{escape(PARTS[part])}"><i class="part {part}"></i>{part}</span>' for part in PARTS
    )
    bars = "".join(_bar(row, split[row.method], longest) for row in comparison.rows)
    return f'<div class="parts">{key}</div><div class="bars">{bars}</div>'


def _bar(row: MethodRow, parts: Mapping[str, float] | None, longest: float) -> str:
    if parts is None:
        reason = "not split: the record lacks phases, or they overlap"
        return (
            f'<div class="bar-name">{_breakable(row.method)}</div><div class="bar-cell aside">{reason}</div>'
        )
    pieces = "".join(
        f'<i class="part {part}" style="width:{100 * parts[part] / longest:.3f}%"></i>'
        for part in PARTS
        if parts[part]
    )
    reason = " · ".join([*_parts_told(parts), *_starting_told(row)])
    whole = words.formatted(sum(parts.values()), words.seconds)
    bar = f'<div class="bar" role="img" aria-label="{escape(reason)}">{pieces}<b>{whole}</b></div>'
    return (
        f'<div class="bar-name">{_breakable(row.method)}</div>'
        f'<div class="bar-cell">{bar}<div class="bar-told">{escape(reason)}</div></div>'
    )


def _parts_told(parts: Mapping[str, float]) -> list[str]:
    return [f"{part} {words.formatted(parts[part], words.seconds)}" for part in PARTS if parts[part]]


def _starting_told(row: MethodRow) -> list[str]:
    seconds = row.spread("starting_s")
    text = None if seconds is None else words.formatted(seconds.mean, words.seconds)
    return [] if text is None else [f"the first step took {text} more, which counts nowhere"]


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
