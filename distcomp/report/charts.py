"""What training learnt: accuracy, loss and whatever was logged, against seconds, bytes, cost and energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from distcomp.report import svg, words
from distcomp.report.exports import as_csv, figure
from distcomp.report.figures import Comparison, MethodRow, Point
from distcomp.report.series import Points, averaged, thinned

MOST_OTHERS = 8
"""So many of what a script logged under names of its own are drawn; the rest is named."""


@dataclass(frozen=True)
class Prices:
    """What a rank's hour and a gigabyte cost, and what a rank draws: 0 where it is not known."""

    per_rank_hour: float = 0.0
    per_gigabyte: float = 0.0
    watts: float = 0.0

    def cost(self, point: Point, ranks: int) -> float:
        """Of all ranks up to an evaluation."""
        hours, gigabytes = point.train_s / 3600, point.sent_bytes / 1e9
        return ranks * (hours * self.per_rank_hour + gigabytes * self.per_gigabyte)

    def energy_kwh(self, point: Point, ranks: int) -> float:
        """Of all ranks up to an evaluation."""
        return ranks * self.watts * point.train_s / 3.6e6


@dataclass(frozen=True)
class Over:
    """What runs to the right."""

    key: str
    label: str
    value: Callable[[Point], float]
    log: bool = False

    @property
    def name(self) -> str:
        """The label without what stands in brackets."""
        return self.label.partition(" (")[0]


SECONDS = Over("train_s", "seconds of training", lambda point: point.train_s)
BYTES = Over(
    "sent_bytes", "bytes sent by each worker (logarithmic)", lambda point: point.sent_bytes, log=True
)


def charts(comparison: Comparison, prices: Prices | None = None) -> Iterator[str]:
    """Accuracy and loss, each against seconds and against bytes; loss against what it costs, where that is
    known; pruned weights against seconds; and what the script logged besides."""
    for name, what, overs in (
        ("test_accuracy", "Test accuracy", (SECONDS, BYTES)),
        ("test_loss", "Test loss", (SECONDS, BYTES, *_priced(comparison, prices))),
        ("pruned", "Share of pruned weights", (SECONDS,)),
    ):
        for over in overs:
            yield from _figure(comparison, name, what, over)
    for at, name in enumerate(other_names(comparison)[:MOST_OTHERS]):
        yield from _figure(comparison, name, name, SECONDS, key=f"other{at}")


def _priced(comparison: Comparison, prices: Prices | None) -> Iterator[Over]:
    ranks = comparison.runs[0].about.get("ranks") or 1
    if prices is not None and (prices.per_rank_hour or prices.per_gigabyte):
        yield Over("cost", "cost of all workers", lambda point: prices.cost(point, ranks))
    if prices is not None and prices.watts:
        yield Over("energy_kwh", "energy of all workers (kWh)", lambda point: prices.energy_kwh(point, ranks))


def _figure(
    comparison: Comparison, name: str, what: str, over: Over, key: str | None = None
) -> Iterator[str]:
    lines, bands = _lines(comparison, name, over)
    if not lines:
        return
    chart = _chart(comparison, name, what, over, lines, bands)
    dotted = "" if chart.level is None else f"dotted: {words.formatted(chart.level, words.loss)}"
    silent = _silent(comparison) if over is BYTES else ""
    yield figure(
        chart.title, chart.draw, key or f"{name}-{over.key}", numbers_of(lines, bands, over.name, what),
        dotted, silent,
    )  # fmt: skip


def _lines(comparison: Comparison, name: str, over: Over) -> tuple[list[svg.Line], list[svg.Band]]:
    """A line for each run; for several of one method their mean, and how far they spread."""
    lines: list[svg.Line] = []
    bands: list[svg.Band] = []
    for style, row in enumerate(comparison.rows):
        runs = [points for run in row.runs if (points := _points(run.curve, name, over))]
        line, band = joined(style, row, runs, over.log)
        lines += line
        bands += band
    return lines, bands


def joined(
    style: int, row: MethodRow, runs: Sequence[Points], log: bool = False
) -> tuple[list[svg.Line], list[svg.Band]]:
    """The runs of one method: their mean and its spread, or each by itself where they have nothing in
    common."""
    mean = averaged(runs, log)
    if mean:
        line = svg.Line(style, f"{row.method}, mean of {len(runs)}", tuple((x, y) for x, y, _ in mean))
        return [line], [svg.Band(style, tuple((x, y - spread, y + spread) for x, y, spread in mean))]
    seeds = [run.seed for run in row.runs]
    labels = [f"{row.method}, seed {seed}" if len(seeds) > 1 else row.method for seed in seeds]
    named = zip(labels, runs, strict=False)
    return [svg.Line(style, label, thinned(points)) for label, points in named], []


def numbers_of(lines: Sequence[svg.Line], bands: Sequence[svg.Band], x_name: str, y_name: str) -> str:
    """What is drawn, as CSV: a line for each point; the standard deviation over seeds, where it is known."""
    spreads = {band.style: [(high - low) / 2 for _, low, high in band.points] for band in bands}
    rows: list[tuple[object, ...]] = []
    for line in lines:
        spread = spreads.get(line.style, [None] * len(line.points))
        rows += [
            (line.label, x, y, "" if s is None else s) for (x, y), s in zip(line.points, spread, strict=True)
        ]
    return as_csv(["line", x_name, y_name, "deviation over seeds"], rows)


def _chart(
    comparison: Comparison, name: str, what: str, over: Over, lines: list[svg.Line], bands: list[svg.Band]
) -> svg.Chart:
    loss, share = name == "test_loss", name in ("test_accuracy", "pruned")
    target = comparison.target_loss if loss else None
    write = _short_size if over.log else _short
    x = svg.span([x for line in lines for x, _ in line.points], write, over.log, not over.log)
    every = [y for line in lines for _, y in line.points]
    every += [y for band in bands for _, *ends in band.points for y in ends]
    values = [y for y in every if not loss or y <= _ceiling(comparison)] or every
    y = svg.span([*values, *([target] if target is not None else [])], _whole_percent if share else _short)
    rings = tuple(_rings(comparison, over, lines, bands)) if loss else ()
    title = f"{what} against {over.name}"
    return svg.Chart(tuple(lines), x, y, over.label, title, target, rings, tuple(bands))


def _points(curve: Sequence[Point], name: str, over: Over) -> Points:
    points = ((over.value(point), _logged(point, name)) for point in curve)
    return tuple((x, y) for x, y in points if y is not None and math.isfinite(y) and (not over.log or x > 0))


def _logged(point: Point, name: str) -> float | None:
    own = {"test_loss": point.test_loss, "test_accuracy": point.test_accuracy, "pruned": point.pruned}
    return own[name] if name in own else point.others.get(name)


def _ceiling(comparison: Comparison) -> float:
    """The highest loss worth showing: where training starts. What diverges leaves the picture."""
    first = [
        run.curve[0].test_loss
        for row in comparison.rows
        for run in row.runs
        if run.curve and run.curve[0].test_loss
    ]
    return max((loss for loss in first if math.isfinite(loss)), default=math.inf)


def _rings(
    comparison: Comparison, over: Over, lines: list[svg.Line], bands: list[svg.Band]
) -> Iterator[tuple[int, float, float]]:
    """Where a line first meets the target: of a mean over seeds, where the mean does."""
    target = comparison.target_loss
    if target is None:
        return
    averaged_styles = {band.style for band in bands}
    for line in lines:
        if line.style in averaged_styles:
            met = next(((x, y) for x, y in line.points if y <= target), None)
            if met is not None:
                yield line.style, *met
    for style, row in enumerate(comparison.rows):
        for run in row.runs if style not in averaged_styles else ():
            point = run.reached(target)
            if point is not None and point.test_loss is not None and (over.value(point) > 0 or not over.log):
                yield style, over.value(point), point.test_loss


def other_names(comparison: Comparison) -> list[str]:
    """Numbers that were logged under names of the script's own, in the order in which they came."""
    points = (point for row in comparison.rows for run in row.runs for point in run.curve)
    return list(dict.fromkeys(name for point in points for name in point.others))


def unread(comparison: Comparison) -> str:
    """What was logged and is not drawn, by its name."""
    names = [*other_names(comparison)[MOST_OTHERS:]]
    names += [name for row in comparison.rows for run in row.runs for name in run.unread]
    return f"Logged and not drawn: {escape(', '.join(dict.fromkeys(names)))}." if names else ""


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
