"""docs/conditional.md: stochastic depth, experts on ranks of their own, what examples decide."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._tables import Block, markdown, result, source


def over_seeds(rows: list[dict[str, Any]], key: str, scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation."""
    values = [row[key] * scale for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def depth() -> str:
    found = result("conditional_depth")
    cells = found["cells"]
    parts = []
    for method in ("identity", "qsgd:bits=4"):
        rows = {key.split("|")[2]: cell for key, cell in cells.items() if key.startswith(f"wire|{method}|")}
        whole = rows["constant, 8 blocks"]
        lines = [
            [
                name,
                f"{cell['interface_bytes']:,.0f}",
                f"{cell['interface_bytes'] / whole['interface_bytes']:.2f}",
                f"{cell['step_s'] * 1e3:.0f}",
                f"{cell['step_s'] / whole['step_s']:.2f}",
                f"{cell['run_share']:.0%}",
            ]
            for name, cell in rows.items()
        ]
        head = [
            f"`{method}`, 2 ranks at 100 Mbit/s",
            "bytes a step",
            "of 8",
            "ms a step",
            "of 8",
            "blocks run",
        ]
        parts.append(markdown(head, lines))
    names = dict.fromkeys(key.split("|")[1] for key in cells if key.startswith("accuracy|"))
    lines = []
    for name in names:
        rows_of = [cell for key, cell in cells.items() if key.startswith(f"accuracy|{name}|")]
        lines.append(
            [
                name,
                over_seeds(rows_of, "test_accuracy", 100),
                f"{statistics.fmean(row['run_share'] for row in rows_of):.0%}",
                str(len(rows_of)),
            ]
        )
    head = ["pairs of digits, one process", "accuracy, %", "blocks run", "seeds"]
    parts.append(markdown(head, lines))
    if "replicas" in cells:
        alike = "the same bits" if cells["replicas"]["replicas_identical"] else "different"
        steps = cells["replicas"]["steps"]
        parts.append(f"After {steps:,} steps with dropped blocks the replicas held {alike}.")
    return "\n\n".join([*parts, source(found, "conditional_depth.py")])


def experts() -> str:
    found = result("conditional_experts")
    lines = []
    for rate in ("100mbit", "1gbit"):
        for name, row in found["cells"][f"links|{rate}"].items():
            kind, codec, tokens = name.split("|")
            both_ms = [f"{row[which] * 1e3:.0f}" for which in ("step_s", "predicted_s")]
            off = row["predicted_over_measured"] - 1
            lines.append([rate, tokens, kind, f"`{codec}`", *both_ms, f"{off:+.0%}"])
    head = ["link", "tokens", "experts", "codec", "ms a step", "predicted", "off"]
    return "\n\n".join([markdown(head, lines), source(found, "conditional_experts.py")])


def rows() -> str:
    found = result("conditional_experts")
    of: dict[str, list[dict[str, Any]]] = {}
    for key, cell in found["cells"].items():
        for name, row in cell["rows"].items() if key.startswith("study") else ():
            of.setdefault(name, []).append(row)
    whole = statistics.fmean(row["row_bytes"] for row in of["bf16"])
    lines = []
    for name, own in of.items():
        mixed = own[0]["row_bytes"] > 0
        sent = statistics.fmean(row["row_bytes"] for row in own)
        lines.append(
            [
                f"rows by `{name}`" if mixed and name != "no balancing" else name,
                over_seeds(own, "test_loss", digits=3),
                over_seeds(own, "test_accuracy", 100),
                f"{sent:,.0f}" if mixed else "",
                f"{sent / whole:.2f}" if mixed else "",
                f"{statistics.fmean(row['load_variation'] for row in own):.2f}" if mixed else "",
                str(len(own)),
            ]
        )
    head = [
        "eight clusters, two ranks",
        "test loss",
        "accuracy, %",
        "bytes a step",
        "of bf16",
        "CV² of load",
        "seeds",
    ]
    return "\n\n".join([markdown(head, lines), source(found, "conditional_experts.py")])


def table() -> str:
    found = result("conditional_table")
    gathered: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for key, rows_of in found["cells"].items():
        task = key.split("|")[0]
        for name, row in rows_of.items():
            gathered.setdefault(task, {}).setdefault(name, []).append(row)
    parts = []
    for task, by_name in gathered.items():
        lines = [
            [
                name,
                over_seeds(own, "test_accuracy", 100),
                f"{statistics.fmean(row['products'] for row in own):,.0f}",
                f"{statistics.median(row['answer_ms'] for row in own):.1f}",
                _about(own),
                str(len(own)),
            ]
            for name, own in by_name.items()
        ]
        head = [task, "accuracy, %", "products of an example", "ms to answer 4,000", "", "seeds"]
        parts.append(markdown(head, lines))
    return "\n\n".join([*parts, source(found, "conditional_table.py")])


def _about(own: list[dict[str, Any]]) -> str:
    if "on_digit" in own[0]:
        units, on_digit, elsewhere = (
            statistics.fmean(row[key] for row in own) for key in ("units", "on_digit", "elsewhere")
        )
        return f"{units:.2f} units: {on_digit:.2f} on digits, {elsewhere:.2f} elsewhere"
    if "share" in own[0]:
        return f"{statistics.fmean(row['share'] for row in own):.0%} taken"
    return f"width {statistics.fmean(row['width'] for row in own):.0f}" if "width" in own[0] else ""


BLOCKS = {
    "depth": Block(depth, "conditional_depth"),
    "experts": Block(experts, "conditional_experts"),
    "rows": Block(rows, "conditional_experts"),
    "table": Block(table, "conditional_table"),
}
