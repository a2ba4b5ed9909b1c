"""docs/averaging.md: tables and plots.

The topologies are drawn, and their spectral gaps computed, from distcomp.averaging.topology.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks._tables import Block, markdown, measured, result, source
from distcomp.averaging.topology import TOPOLOGIES, Topology, resolve

SIZES = (8, 16, 64)


# ------------------------------------------------------------------------------------------- topologies


def topologies() -> str:
    """Degree, spectral gap and DCD's limit, by size."""
    rows = []
    for name in TOPOLOGIES:
        found = [resolve(name, size) for size in SIZES]
        degrees = ", ".join(f"{max(t.degree(rank) for rank in range(t.size)):.0f}" for t in found)
        gaps = ", ".join(f"{t.spectral_gap:.3f}" for t in found)
        limits = ", ".join("–" if t.changes else f"{t.spectral_gap / (2 * t.mu):.3f}" for t in found)
        rows.append([f"`{name}`", degrees, gaps, limits])
    sizes = ", ".join(map(str, SIZES))
    return markdown(
        ["topology", f"most neighbours ({sizes} ranks)", "spectral gap", "DCD: alpha below"], rows
    )


def draw_topologies() -> Figure:
    figure, axes = plt.subplots(2, 4, figsize=(8, 4.4))
    for axis, name in zip(axes.flat, TOPOLOGIES, strict=True):
        _draw(axis, resolve(name, 8))
    return figure


def _draw(axis: Any, topology: Topology) -> None:
    """Workers on a circle; a line for each pair that talks, lighter for a pair whose turn comes later."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(topology.size) / topology.size
    places = np.column_stack([np.cos(angles), np.sin(angles)])
    for context, matrix in enumerate(topology.matrices):
        for i, j in np.argwhere(np.triu(matrix, 1)):
            style = ["-", "--", ":"][context]
            axis.plot(*places[[i, j]].T, style, color="#4477aa", linewidth=1, zorder=1)
    axis.scatter(*places.T, s=60, color="white", edgecolors="#222222", zorder=2)
    for rank, place in enumerate(places):
        axis.annotate(str(rank), place, ha="center", va="center", fontsize=6)
    axis.set_title(f"{topology.name}\nspectral gap {topology.spectral_gap:.3f}", fontsize=8)
    axis.set_aspect("equal")
    axis.axis("off")


# ------------------------------------------------------------------------------------------- studies


def decentralized() -> str:
    from benchmarks.decentralized_table import show

    found = result("decentralized_table")
    return f"{show(found['table'], found['published'])}\n\n{source(found, 'decentralized_table.py')}"


def pqasgd_loss(kind: str = "loss") -> str:
    found = result("pqasgd")
    base = found[kind]["full SGD"]
    rows = [
        [name, f"{100 * row['sent_bytes'] / base['sent_bytes']:.1f} %", _losses(row), _percent(row)]
        if "mean" in row
        else [name, "", "diverges", ""]
        for name, row in found[kind].items()
    ]
    head = ["", "bytes sent", "test loss (range, seeds)", "accuracy"]
    return f"{markdown(head, rows)}\n\n{source(found, 'pqasgd.py')}"


def _losses(row: dict[str, Any]) -> str:
    low, high = row["range"]
    lost = f", {row['diverged']} diverge" if row["diverged"] else ""
    return f"{row['mean']:.3f} ({low:.3f}–{high:.3f}, {row['seeds']}{lost})"


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['test_accuracy']:.1f} %"


def pqasgd_speed() -> str:
    speed = result("pqasgd")["speed"]
    workers = list(next(iter(speed.values())))
    rows = [[name, *(str(points[n]["steps"] or "–") for n in workers)] for name, points in speed.items()]
    return markdown(["steps to the target, workers:", *workers], rows)


def draw_speed() -> Figure:
    speed = result("pqasgd")["speed"]
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for (name, points), mark in zip(speed.items(), "os^", strict=True):
        there = {int(n): point["steps"] for n, point in points.items() if point["steps"]}
        axis.loglog(list(there), list(there.values()), marker=mark, markersize=4, linewidth=1, label=name)
    workers = [int(n) for n in next(iter(speed.values()))]
    first = speed["full SGD"]["1"]["steps"]
    axis.loglog(workers, [first / n for n in workers], ":", color="grey", label="linear")
    axis.set(xlabel="workers", ylabel="steps to the target", xticks=workers, xticklabels=map(str, workers))
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False)
    return figure


NETWORKS = {"averaging_time_10mbit": "10 Mbit/s", "averaging_time_100mbit_20ms": "100 Mbit/s and 20 ms"}


def seconds() -> str:
    """A row per method: steps, and what a step and all of them take on each network that was measured."""
    runs = {label: result(name) for name, label in NETWORKS.items() if measured(name)}
    first = next(iter(runs.values()))
    rows = []
    for name in first["methods"]:
        cells = [str(first["methods"][name].get("steps", ""))]
        for run in runs.values():
            row = run["methods"][name]
            cells.append(f"{1e3 * row['step_s_median']:.0f} ms")
            cells.append(
                f"{row['seconds_to_target']:.1f} s ({row['speed_up']:.1f} ×)" if "steps" in row else ""
            )
        rows.append([name, *cells])
    head = ["", "steps", *(cell for label in runs for cell in (f"a step at {label}", "to the target"))]
    networks = "\n".join(f"* {label}: {'; '.join(run['network'])}" for label, run in runs.items())
    return f"{markdown(head, rows)}\n\n{source(first, 'averaging_time.py')}\n\n{networks}"


def sizes() -> str:
    found = result("averaging_sizes")
    names = list(next(iter(found["ranks"].values()))["methods"])
    rows = [
        [f"{ranks} ranks", *(f"{1e3 * raw['methods'][name]['step_s_median']:.0f} ms" for name in names)]
        for ranks, raw in found["ranks"].items()
    ]
    return markdown([f"a step at {found['rate'].replace('mbit', ' Mbit/s')}", *names], rows)


def drift() -> str:
    found = result("gossip_drift")
    rows = [
        [
            name,
            f"{row['replicas_that_differed']}",
            f"{row['mean_moved_besides']:.1e}",
        ]
        for name, row in found["methods"].items()
    ]
    head = [f"{found['steps']:,} steps", "replicas that differed", "mean of the models moved besides"]
    return f"{markdown(head, rows)}\n\n{source(found, 'gossip_drift.py')}"


def relatives() -> str:
    """A row per method and inner optimizer: what it has over averaged gradients, and for how many bytes."""
    found = result("relatives")
    rows = []
    for key, row in found["table"].items():
        inner, _, name = key.partition(" | ")
        name = f"`{name}`" if name[0].islower() and " " not in name else name
        if "mean" not in row:
            rows.append([inner, name, "", "diverges", ""])
            continue
        fewer = row.get("times_fewer_bytes")
        rows.append(
            [
                inner,
                "averaged gradients" if name == "`identity`" else name,
                f"{fewer:,.1f} ×" if fewer else "nothing",
                _losses(row),
                f"{100 * row['relative_loss'] - 100:+.1f} %",
            ]
        )
    head = ["inner optimizer", "", "fewer bytes", "test loss (range, seeds)", "against averaged gradients"]
    return f"{markdown(head, rows)}\n\n{source(found, 'relatives.py')}"


def late_workers() -> str:
    """A row per cell: what was slow, what was done about it, what became of the seconds, and the loss."""
    account, trained = result("late_account"), result("late_workers")
    base = trained["cells"]["no faults"]["test_loss"]
    rows = []
    for name, cell in account["cells"].items():
        with_loss = trained["cells"].get(name)
        loss = f"{with_loss['test_loss']:.3f}" if with_loss else "–"
        apart = f" ({100 * with_loss['test_loss'] / base - 100:+.1f} %)" if with_loss else ""
        rows.append(
            [
                name,
                f"`{cell['on_failure'].replace('grace_s=1e+09', 'grace_s=forever')}`",
                f"{100 * cell['goodput']:.1f} %",
                f"{cell['virtual_s'] / account['plan']['rounds']:.0f} s",
                f"{cell['mean_members']:.0f}",
                f"{cell['carried']:,}, {cell['dropped']:,}",
                f"{cell['died']:,}, {cell['joined']:,}",
                loss + apart,
            ]
        )
    plan = account["plan"]
    head = [
        f"{plan['workers']:,} workers, {plan['rounds']} rounds of {plan['period']} steps", "`on_failure`",
        "goodput", "a round takes", "members", "carried, dropped", "died, joined",
        f"test loss after {trained['plan']['rounds']} rounds (against no faults)",
    ]  # fmt: skip
    about = f"{source(account, 'late_workers.py --account')}\nLosses: {source(trained, 'late_workers.py')}"
    return f"{markdown(head, rows)}\n\n{about}"


def late_hosts() -> str:
    cell = result("late_hosts")
    head = [
        "outer steps due",
        "held",
        "lost",
        "killed after",
        "joined in",
        "steps repeated",
        "models differed in",
    ]
    row = [
        str(cell["outer_steps_due"]), str(cell["outer_steps_held"]), str(cell["outer_steps_lost"]),
        f"step {cell['killed_after']}", f"step {cell['joined_at']}", str(cell["steps_repeated"]),
        f"{cell['rounds_in_which_models_differed']} steps",
    ]  # fmt: skip
    about = f"* {'; '.join(cell['network'])}"
    return f"{markdown(head, [row])}\n\n{source(cell, 'late_workers.py --hosts')}\n\n{about}"


BLOCKS = {
    "late-workers": Block(late_workers, "late_workers", "late_account"),
    "late-hosts": Block(late_hosts, "late_hosts"),
    "relatives": Block(relatives, "relatives"),
    "topologies": Block(topologies),
    "decentralized": Block(decentralized, "decentralized_table"),
    "pqasgd-loss": Block(pqasgd_loss, "pqasgd"),
    "pqasgd-language": Block(lambda: pqasgd_loss("language"), "pqasgd"),
    "pqasgd-speed": Block(pqasgd_speed, "pqasgd"),
    "seconds": Block(seconds, next(iter(NETWORKS))),
    "sizes": Block(sizes, "averaging_sizes"),
    "drift": Block(drift, "gossip_drift"),
}

FIGURES: dict[str, Callable[[], Figure]] = {
    "topologies": draw_topologies,
    "pqasgd_speed": draw_speed,
}
