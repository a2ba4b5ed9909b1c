"""docs/pareto.md: loss against bytes, a table for each regime, and which targets are met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from benchmarks._pareto_rows import CORRECTIONS
from benchmarks._tables import Block, markdown, result, source

Row = dict[str, Any]
FAMILIES = {"control": "#888888", "every step": "#4477aa", "rare": "#cc6677", "gossip": "#117733"}
DDP = "identity"
HIGHEST = 16
"""Per cent above DDP: what is worse is in the table, not in the chart."""


def percent(row: Row) -> str:
    """Against DDP, and the range over seeds where there are several."""
    relative = [100 * (one - 1) for one in row["relative"]]
    spread = f" ({min(relative):+.1f} to {max(relative):+.1f})" if len(relative) > 1 else ""
    lost = f", {row['diverged']} diverged" if row["diverged"] else ""
    return f"{100 * (row['relative_loss'] - 1):+.1f} %{spread}{lost}"


def steps(row: Row) -> str:
    """Steps beyond DDP's, seed by seed the mean; nothing where they were not asked for."""
    if "more_steps" not in row:
        return ""
    if row["mean_more_steps"] is None:
        longest = result("pareto")["plan"]["longer"][-1] / result("pareto")["plan"]["steps"] - 1
        return f"more than +{100 * longest:.0f} %"
    return f"{100 * row['mean_more_steps']:+.1f} %" if row["mean_more_steps"] else "none"


def named(name: str, row: Row) -> str:
    """The method's text as it was tuned, or the control's name."""
    if name == DDP:
        return "DDP fp32"
    inside = f" ({row['inner']} inside)" if row.get("inner", "AdamW") == "Muon" else ""
    if row.get("spec") == DDP:
        return f"DDP fp32{inside}"
    return f"`{row['spec']}`{inside}" if _is_method(row.get("spec", name)) else name


def _is_method(text: str) -> bool:
    return text.partition(":")[0].isidentifier()


def table(regime: str) -> str:
    rows = result("pareto")["tables"][regime]
    begun = any(row.get("times_fewer_in_all") for row in rows.values())
    lines = [_line(name, row, begun) for name, row in sorted(rows.items(), key=_order)]
    fewer = ["fewer bytes than DDP", "with the warm-up"] if begun else ["fewer bytes than DDP"]
    head = ["", "rate", *fewer, "test loss, seeds", "against DDP", "more steps to its loss"]
    return markdown(head, lines)


def _order(item: tuple[str, Row]) -> tuple[int, float]:
    """Family after family, the best loss first."""
    return list(FAMILIES).index(item[1]["family"]), item[1].get("relative_loss", float("inf"))


def _line(name: str, row: Row, begun: bool) -> list[str]:
    rate = f"{row['rate']:g}" if "rate" in row else ""
    if "mean" not in row:
        return [named(name, row), rate, *[""] * (1 + begun), "diverges", "", ""]
    fewer = [row["times_fewer_bytes"], row["times_fewer_in_all"]][: 1 + begun]
    told = [f"{times:,.0f} ×" if times else "nothing sent" for times in fewer]
    loss = f"{row['mean']:.4f}, {row['seeds']}"
    return [named(name, row), rate, *told, loss, percent(row), steps(row)]


def of_regime(regime: str) -> Callable[[], str]:
    return lambda: f"{table(regime)}\n\n{source(result('pareto'), 'pareto.py')}"


def ranked() -> str:
    """Methods where data is apart, whatever their family, the lowest loss first; then controls."""
    rows = result("pareto")["tables"]["apart"]
    methods = sorted(
        (item for item in rows.items() if item[1]["family"] != "control"),
        key=lambda item: item[1].get("relative_loss", float("inf")),
    )
    controls = sorted((item for item in rows.items() if item[1]["family"] == "control"), key=_order)
    lines = [
        [str(place), row["family"], *_line(name, row, False)] for place, (name, row) in enumerate(methods, 1)
    ]
    lines += [["", "control", *_line(name, row, False)] for name, row in controls]
    head = ["rank", "", "", "rate", "fewer bytes than DDP", "test loss, seeds", "against DDP"]
    more = "more steps to its loss"
    return f"{markdown([*head, more], lines)}\n\n{source(result('pareto'), 'pareto.py')}"


def muon() -> str:
    """Rows with Muon inside, against both."""
    lines = []
    for name, row in sorted(result("pareto")["tables"]["scratch"].items(), key=_order):
        if row.get("inner") == "Muon" and "relative" in row:
            fewer = f"{row['times_fewer_bytes']:,.0f} ×" if row["times_fewer_bytes"] else "nothing sent"
            same = row.get("relative_to_same_inside")
            beside = percent({**row, "relative": same, "relative_loss": mean(same)}) if same else ""
            lines.append([named(name, row), fewer, percent(row), beside])
    return markdown(
        ["", "fewer bytes", "against DDP with AdamW inside", "against DDP with Muon inside"], lines
    )


def corrections() -> str:
    """Each method beside itself without what corrects it."""
    rows = result("pareto")["tables"]["apart"]

    def told(name: str) -> list[str]:
        row = rows.get(name)
        if row is None:
            return [f"`{name}`", "not measured yet"]
        return [f"`{name}`", percent(row) if "relative" in row else "diverges"]

    lines = [[by, *told(corrected), *told(plain)] for corrected, plain, by in CORRECTIONS]
    return markdown(["what corrects", "with it", "against DDP", "without it", "against DDP"], lines)


def targets() -> str:
    """What was to be shown, the row that is nearest to it, and whether that is enough."""
    met = result("pareto")["met"]
    rare = "at most 5 % more steps to DDP's final loss"
    lines = [
        _target("85 × fewer bytes, at most 1 % higher loss at equal steps", "scratch", "equal steps", 85),
        _target("the same by a method that exchanges in every step", "scratch", "every step", 85),
        _target(f"rare, from scratch: 1,000 × fewer bytes, {rare}", "scratch", "rare", 1000),
        _target(f"rare, from a trained model: 1,000 × fewer bytes, {rare}", "trained", "rare", 1000),
    ]
    for regime in ("scratch", "trained"):
        for name, row in result("pareto")["tables"][regime].items():
            if row["family"] == "control" and row.get("spec") != DDP:
                enough = f"{regime} | {name}" in met["controls"]
                told = [f"control, {regime}, fails by more than 3 %", _word(enough), name, ""]
                lines.append([*told, percent(row) if "relative" in row else "diverges", ""])
    return markdown(["target", "", "nearest row", "fewer bytes", "against DDP", "more steps"], lines)


def _target(target: str, regime: str, family: str, fewest: float) -> list[str]:
    """Of a family (``equal steps``: of all methods), the row of the lowest loss among those that send so many
    times fewer bytes."""
    found = result("pareto")
    rows = {
        name: row
        for name, row in found["tables"][regime].items()
        if (row["family"] == family or (family == "equal steps" and row["family"] != "control"))
        and (row.get("times_fewer_bytes") or 0) >= fewest
    }
    if not rows:
        return [target, "not measured yet", "", "", "", ""]
    met = [one for one in found["met"][family] if one.startswith(f"{regime} | ")]
    names = [one.partition(" | ")[2] for one in met] or list(rows)
    name = min(names, key=lambda one: rows[one]["relative_loss"])
    fewer = f"{rows[name]['times_fewer_bytes']:,.0f} ×"
    return [target, _word(bool(met)), named(name, rows[name]), fewer, percent(rows[name]), steps(rows[name])]


AT_LEAST = (4, 10, 30, 85, 300, 1000)
"""Times fewer bytes: the lines of the table that chooses."""


def choose() -> str:
    """The lowest loss for at least so many times fewer bytes, in each regime; controls are no choice."""
    lines = []
    for fewest in AT_LEAST:
        found = [_lowest(regime, fewest) for regime in ("scratch", "trained", "apart")]
        lines.append([f"{fewest:,} ×", *found])
    return markdown(["at least", "from scratch", "from a trained model", "packages of its own"], lines)


def _lowest(regime: str, fewest: float) -> str:
    rows = {
        name: row
        for name, row in result("pareto")["tables"][regime].items()
        if row["family"] != "control" and (row.get("times_fewer_bytes") or 0) >= fewest
    }
    if not rows:
        return "not measured yet"
    name, row = min(rows.items(), key=lambda one: one[1]["relative_loss"])
    return f"{named(name, row)}: {percent(row)}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"


def progress() -> str:
    """How much of the study is there."""
    tables = result("pareto")["tables"]
    told = []
    for regime, rows in tables.items():
        seeds = [row["seeds"] for row in rows.values()]
        told.append(
            f"{regime}: {len(seeds)} rows" + (f" of {min(seeds)} to {max(seeds)} seeds" if seeds else "")
        )
    return f"Measured so far: {'; '.join(told)}."


def _word(met: bool) -> str:
    return "**met**" if met else "**missed**"


def draw() -> Figure:
    """Every row with a loss near DDP's, from scratch (full) and from a trained model (hollow)."""
    figure, axis = plt.subplots(figsize=(8.5, 6))
    axis.set_xscale("log")
    axis.margins(x=0.1, y=0.08)
    axis.set(
        xlabel="bytes sent per worker, times fewer than DDP", ylabel="test loss against DDP, per cent higher"
    )
    axis.axhspan(0, 1, color="grey", alpha=0.15, linewidth=0)
    points = {}
    for regime, face in (("scratch", None), ("trained", "white")):
        for name, row in result("pareto")["tables"][regime].items():
            fewer, off = row.get("times_fewer_bytes"), 100 * (row.get("relative_loss", 9) - 1)
            if not fewer or off > HIGHEST or row["family"] == "control":
                continue
            color = FAMILIES[row["family"]]
            axis.plot(fewer, off, "o", markersize=4, color=color, markerfacecolor=face or color)
            after = ", trained" if regime == "trained" else ""
            points[_short(name) + after] = (fewer, off)
    figure.tight_layout(h_pad=1.5)  # as it is saved: places are measured below
    _name_points(axis, points)
    return figure


def _short(name: str) -> str:
    return name.replace("period=", "").replace("compressor=", "").replace("values=", "").replace("ratio=", "")


def _name_points(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points, on the side where there is room, each moved up until it covers no other."""
    axis.figure.canvas.draw()
    placed: list[Bbox] = []
    for name, point in sorted(points.items(), key=lambda one: one[1][1]):
        across = axis.transAxes.inverted().transform(axis.transData.transform(point))[0]
        side, shift = ("right", -5) if across > 0.6 else ("left", 5)
        text = axis.annotate(
            name, point, xytext=(shift, 0), textcoords="offset points", fontsize=6, ha=side, va="center"
        )
        while any(text.get_window_extent().overlaps(other) for other in placed):
            text.xyann = (shift, text.xyann[1] + 1)
        placed.append(text.get_window_extent())


BLOCKS = {
    "targets": Block(targets, "pareto", key="tables"),
    "muon": Block(muon, "pareto", key="tables"),
    "choose": Block(choose, "pareto", key="tables"),
    "progress": Block(progress, "pareto", key="tables"),
    "scratch": Block(of_regime("scratch"), "pareto", key="tables"),
    "trained": Block(of_regime("trained"), "pareto", key="tables"),
    "apart": Block(ranked, "pareto", key="tables"),
    "corrections": Block(corrections, "pareto", key="tables"),
}

FIGURES: dict[str, Callable[[], Figure]] = {"pareto": draw}
