"""What a closer look at some steps found: bytes by kind, what compression leaves out, layers, one step's
timeline, memory."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from distcomp.recording import Record, Run
from distcomp.report import svg, words
from distcomp.report.bars import Stretch, stacked, timeline
from distcomp.report.charts import joined, numbers_of
from distcomp.report.exports import as_csv, figure
from distcomp.report.figures import Comparison, MethodRow
from distcomp.report.series import Points, norm

KIND_STYLES = 8
MOST_LAYERS = 30
MOST_BUCKETS = 16
PHASES = {"encode": "compressing", "recode": "between rounds", "wait": "waiting", "decode": "decompressing",
          "wire": "on the wire"}  # fmt: skip


def runs_of(comparison: Comparison, row: MethodRow) -> list[Run]:
    """The runs of a method."""
    return [run for run in comparison.runs if run.method == row.method]


def bytes_by_kind(comparison: Comparison) -> str:
    """A bar per method, as long as what a rank sends in a step; empty where no kind was recorded."""
    rows = [(row.method, by_kind(runs_of(comparison, row))) for row in comparison.rows]
    kinds = sorted({kind for _, parts in rows for kind, value in parts.items() if value})
    if not kinds:
        return ""
    styles = {kind: f"k{at % KIND_STYLES}" for at, kind in enumerate(kinds)}
    shown = [(name, {kind: parts.get(kind, 0.0) for kind in kinds}) for name, parts in rows]
    title = "Bytes of a step by kind"

    def draw(width: int, height: int, key: str) -> str:
        return stacked(shown, styles, _size, title, width)

    numbers = as_csv(["method", *kinds], ([name, *parts.values()] for name, parts in shown))
    return figure(title, draw, "kinds", numbers, after=legend(styles, kinds), full=True)


def by_kind(runs: Sequence[Run]) -> dict[str, float]:
    """Mean over steps and ranks of what was sent of each kind."""
    total: Counter[str] = Counter()
    steps = 0
    for run in runs:
        for rank in run.ranks:
            for step in run.of_kind("step", rank):
                total.update(step.get("payload_by_kind") or {})
                steps += 1
    return {kind: sent / steps for kind, sent in total.items()}


def legend(styles: Mapping[str, str], words_of: Sequence[str] | Mapping[str, str]) -> str:
    """What the colours of bars mean."""
    told = words_of if isinstance(words_of, Mapping) else {}
    return (
        '<div class="parts">'
        + "".join(
            f'<span><i class="part {styles[one]}"></i>{escape(one)}'
            f"{f' <small>{escape(told[one])}</small>' if one in told else ''}</span>"
            for one in words_of
        )
        + "</div>"
    )


def over_steps(comparison: Comparison) -> Iterator[str]:
    """What is owed, and what a step's compression leaves out, against steps."""
    yield from _over_steps(comparison, "residual_norm", "Norm of what is owed (residuals)", norm)
    yield from _over_steps(comparison, "error", "Compression error |v − C(v)| / |v|", _weighted)


def _over_steps(
    comparison: Comparison, name: str, title: str, total: Callable[[Sequence[float | None]], float | None]
) -> Iterator[str]:
    lines: list[svg.Line] = []
    bands: list[svg.Band] = []
    for style, row in enumerate(comparison.rows):
        runs = [points for run in runs_of(comparison, row) if (points := _detailed(run, name, total))]
        if any(y for points in runs for _, y in points):
            line, band = joined(style, row, runs)
            lines += line
            bands += band
    if not lines:
        return
    x = svg.span([x for line in lines for x, _ in line.points], _short, zero=True)
    every = [y for line in lines for _, y in line.points] + [y for b in bands for *_, y in b.points]
    chart = svg.Chart(
        tuple(lines), x, svg.span(every, _short, zero=True), "step", f"{title}, over steps", None, (),
        tuple(bands),
    )  # fmt: skip
    yield figure(chart.title, chart.draw, name, numbers_of(lines, bands, "step", title))


def _detailed(run: Run, name: str, total: Callable[[Sequence[float | None]], float | None]) -> Points:
    """Of rank 0: (step, all parameters together)."""
    points = []
    for record in run.of_kind("detail"):
        found = (record.get("parameters") or {}).values()
        value = total([one.get(name) for one in found])
        if value is not None and math.isfinite(value):
            points.append((float(record["step"]), value))
    return tuple(points)


def _weighted(errors: Sequence[float | None]) -> float | None:
    """The root mean square over parameters."""
    whole = norm(errors)
    return None if whole is None else whole / math.sqrt(len(errors))


def parameter_tables(comparison: Comparison) -> str:
    """A table per method: what each parameter sends and loses, at the last closer look."""
    tables = []
    for row in comparison.rows:
        last = next((d for run in runs_of(comparison, row) for d in _with_parameters(run)), None)
        if last is not None:
            tables.append(_layers(row.method, last))
    return "".join(tables)


def _with_parameters(run: Run) -> list[Record]:
    """The last record that has some."""
    return [record for record in run.of_kind("detail") if record.get("parameters")][-1:]


def _layers(method: str, record: Record) -> str:
    found = sorted(record["parameters"].items(), key=lambda one: -(one[1].get("numel") or 0))
    head = ("parameter", "numbers", "bytes by itself", "norm of gradient", "norm owed", "error")
    rows = [(name, *_layer(one)) for name, one in found[:MOST_LAYERS]]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    left = len(found) - len(rows)
    rest = f'<p class="aside">The {left} smallest parameters are left out.</p>' if left else ""
    return (
        f"<details><summary>{escape(method)}, parameter by parameter, step {record['step']}</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(method)}, parameters">'
        f'<table class="plain"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{rest}</details>"
    )


def _layer(one: Mapping[str, float | None]) -> list[str]:
    def cell(name: str, write: words.Write) -> str:
        value = one.get(name)
        return words.MISSING if value is None else words.formatted(value, write)

    return [
        f"{int(one.get('numel') or 0):,}", cell("payload_bytes", words.size),
        cell("gradient_norm", words.number), cell("residual_norm", words.number),
        cell("error", words.percent),
    ]  # fmt: skip


def timelines(comparison: Comparison) -> Iterator[str]:
    """One step of each method: rank 0, in the middle of what was recorded of its first run."""
    for at, row in enumerate(comparison.rows):
        records = [r for r in runs_of(comparison, row)[0].of_kind("detail") if r.get("spans")]
        if records:
            yield _timeline(at, row.method, records[len(records) // 2])


def _timeline(at: int, method: str, record: Record) -> str:
    spans = [Stretch(phase, int(b), int(r), begin, end) for phase, b, r, begin, end in record["spans"]]
    shown = [one for one in spans if one.bucket < MOST_BUCKETS]
    title = f"{method}: step {record['step']}"

    def draw(width: int, height: int, key: str) -> str:
        return timeline(shown, record.get("ready_s"), title, width)

    rows = ((one.phase, one.bucket, one.round, one.begin_s, one.end_s) for one in spans)
    numbers = as_csv(["phase", "bucket", "round", "begin in s", "end in s"], rows)
    left = len({one.bucket for one in spans}) - len({one.bucket for one in shown})
    rest = f'<p class="aside">{left} more buckets are in the CSV.</p>' if left else ""
    return figure(title, draw, f"timeline{at}", numbers, after=rest, full=True)


def memory(comparison: Comparison) -> str:
    """What each rank held at most, and what the method keeps of it."""
    rows: list[tuple[str, int, list[Mapping[str, float]]]] = []
    for row in comparison.rows:
        held: dict[int, list[Mapping[str, float]]] = {}
        for run in runs_of(comparison, row):
            for rank in run.ranks:
                held.setdefault(rank, []).extend(
                    record["memory"] for record in run.of_kind("detail", rank)[-1:] if record.get("memory")
                )
        rows += [(row.method, rank, found) for rank, found in sorted(held.items()) if found]
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(method)}</th><td>{rank}</td>'
        f"<td>{_size(_mean(found, 'state_bytes'))}</td><td>{_size(_mean(found, 'peak_bytes'))}</td></tr>"
        for method, rank, found in rows
    )
    head = "".join(
        f'<th scope="col">{title}</th>' for title in ("method", "rank", "kept by the method", "peak")
    )
    return (
        "<details><summary>Memory of each rank</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Memory of each rank">'
        f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _mean(found: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(one.get(name) or 0.0 for one in found)


def _size(value: float) -> str:
    return words.formatted(value, words.size)


def _short(value: float) -> str:
    return f"{value:g}"


def closer_section(comparison: Comparison) -> str:
    """All of it that was recorded; empty where nothing was."""
    steps, drawn = list(over_steps(comparison)), list(timelines(comparison))
    tables = parameter_tables(comparison) + memory(comparison)
    parts = []
    if steps or tables:
        aside = (
            "Every few steps rank 0 looks closer: what is owed after the step, and what compression left out "
            "of v, the gradient and what was owed before. Of all parameters: the norm of what is owed, and "
            "the root mean square of the errors."
        )
        parts.append(
            f'<section><h2>What compression leaves out</h2><div class="charts">{"".join(steps)}</div>'
            f'<p class="aside">{aside}</p>{tables}</section>'
        )
    if drawn:
        key = legend({phase: phase for phase in PHASES}, PHASES)
        aside = (
            "A row per bucket: the upper lane is the processor, the lower one the wire, with the number of "
            "the round. The dotted line is when the last gradient was there."
        )
        parts.append(
            f"<section><h2>One step, bucket by bucket</h2>{key}"
            f'<div class="stack">{"".join(drawn)}</div><p class="aside">{aside}</p></section>'
        )
    return "".join(parts)
