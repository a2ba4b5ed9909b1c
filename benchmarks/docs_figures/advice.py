"""docs/advice.md: predictions beside measurements."""

from __future__ import annotations

from typing import Any

from benchmarks._tables import Block, markdown, result, source

NETWORKS = {"10mbit": "10 Mbit/s", "100mbit": "100 Mbit/s", "racks": "two racks", "1gbit": "1 Gbit/s"}


def errors() -> str:
    """Predicted and measured step times, and how far they lie apart."""
    found = result("model_error")
    cells = found["cells"]
    head = ["", *(f"{one['ranks']} ranks, {NETWORKS[one['network']]}" for one in cells)]
    rows = [
        [f"`{method}`", *(_beside(one["methods"].get(method)) for one in cells)]
        for method in cells[0]["methods"]
    ]
    verdict = found["verdict"]
    wrong, pairs = verdict["pairs_in_the_wrong_order"], verdict["pairs_apart_by_15_percent"]
    worst = f"{verdict['worst_error']:.0%} ({verdict['worst']})"
    said = (
        f"{verdict['predictions']} predictions: median error {verdict['median_error']:.1%}, worst {worst}. "
        f"Of {pairs} pairs of methods that differ by more than 15 %, {len(wrong)} are told in the wrong order"
        + (f": {'; '.join(wrong)}." if wrong else ".")
    )
    return f"{markdown(head, rows)}\n\n{said}\n\n{source(found, 'model_error.py')}"


def _beside(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    predicted, measured = 1000 * row["predicted_s"], 1000 * row["measured_s"]
    return f"{predicted:.0f} / {measured:.0f} ms ({row['error']:+.0%})"


def scale() -> str:
    """What a thousand workers take."""
    found = result("simulate_scale")
    largest = max(one["workers"] for one in found["cells"])
    rows = []
    for one in found["cells"]:
        if one["workers"] != largest:
            continue
        fits = found["fits"][one["method"]]
        cpu, memory = fits["cpu_seconds_per_step"], fits["peak_bytes"]
        rows.append([
            f"`{one['method']}`", f"{one['seconds']:.0f} s", f"{one['peak_bytes'] / 1e9:.2f} GB",
            f"{1e3 * cpu['b']:.2f} ms per worker (r² {cpu['r_squared']:.3f})",
            f"{memory['b'] / 1e6:.2f} MB per worker (r² {memory['r_squared']:.3f})",
        ])  # fmt: skip
    steps = max(one["steps"] for one in found["cells"])
    head = [f"{largest:,} workers", f"{steps} steps", "peak memory", "CPU of a step grows by", "memory by"]
    return f"{markdown(head, rows)}\n\n{source(found, 'simulate_scale.py')}"


def check() -> str:
    """The advice, and what then won."""
    found = result("advice_check")
    head = ["4 ranks", "advised", "fastest in emulation", "what it said"]
    rows = [
        [one["rate"], f"`{one['recommended']}`", f"`{one['fastest_measured']}`", one["sentence"]]
        for one in found["cells"]
    ]
    return f"{markdown(head, rows)}\n\n{source(found, 'advice_check.py')}"


def buckets() -> str:
    """Every bucket size, measured and predicted, and what was advised."""
    found = result("bucket_plan")
    sizes = list(found["cells"][0]["methods"]["qsgd:bits=4"]["sizes"])
    head = ["delay", "method", *(f"{one} MB" if one != "default" else one for one in sizes), "advised"]
    rows = [
        [cell["delay"], f"`{method}`", *map(_measured, row["sizes"].values()), _advised(row)]
        for cell in found["cells"]
        for method, row in cell["methods"].items()
    ]
    said = (
        f"Milliseconds of a step on {found['ranks']} ranks at 100 Mbit/s: measured (predicted after "
        f"`calibrate`, predicted as by `advise`), of {found['gradient_bytes'] / 1e6:.0f} MB of gradients in "
        "layers of 1 MB; and the size advised after `calibrate`, with what a step took in it over the "
        "default's."
    )
    return f"{markdown(head, rows)}\n\n{said}\n\n{source(found, 'bucket_plan.py')}"


def _measured(row: dict[str, Any]) -> str:
    measured, predicted, advised = (1e3 * row[f"{name}_s"] for name in ("measured", "predicted", "advised"))
    return f"{measured:.0f} ({predicted:.0f}, {advised:.0f})"


def _advised(row: dict[str, Any]) -> str:
    cap_mb, over = row["calibrated"]["cap_mb"], row["calibrated"]["over_default"]
    return "default" if cap_mb is None else f"{cap_mb:g} MB: {over:.2f}"


BLOCKS = {
    "model_error": Block(errors, "model_error"),
    "simulate_scale": Block(scale, "simulate_scale"),
    "advice_check": Block(check, "advice_check"),
    "bucket_plan": Block(buckets, "bucket_plan"),
}
