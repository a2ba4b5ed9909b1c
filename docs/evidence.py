"""What was measured of each method: the rows of its page, read from the committed results of the benchmarks.
One function for each family of result files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from distcomp.errors import DistcompError
from distcomp.methods import parse

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GOSSIP = {"D-PSGD": "dpsgd", "DCD": "dcd", "ECD": "ecd", "CHOCO": "choco", "DeepSqueeze": "deepsqueeze"}

Row = tuple[str, str, str]
"""What was run, what was measured, and the result file that says so."""


def evidence() -> Iterator[tuple[str, Row]]:
    """(method, row) for each figure of a method in the benchmarks' results."""
    for path in sorted(RESULTS.glob("step_*.json")):
        yield from _exchanges(path)
    yield from _losses(RESULTS / "digit_pairs.json")
    yield from _seconds()
    yield from _accuracies(RESULTS / "decentralized_table.json")
    yield from _peers(RESULTS / "peers.json")
    yield from _pareto(RESULTS / "pareto.json")
    yield from _relatives(RESULTS / "relatives.json")
    yield from _budgets(RESULTS / "allocation.json")
    yield from _gradiveq(RESULTS / "gradiveq_loss.json")
    yield from _bytes(RESULTS / "method_bytes.json")


def _exchanges(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    where = f"exchange of {found['gradient_bytes'] / 1e6:.1f} MB, {found['ranks']} ranks, {found['rate']}"
    ddp = found["methods"]["ddp"]
    for spec, row in found["methods"].items():
        faster = ddp["exchange_s"] / row["exchange_s"]
        text = f"{1000 * row['exchange_s']:.0f} ms, {faster:.1f} × as fast as DDP; "
        text += f"{ddp['payload_bytes'] / row['payload_bytes']:.1f} × fewer bytes"
        yield from _told(spec, where, text, path)


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


def _peers(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    for label, spec in found["methods"].items():
        for rate in ("100mbit", "1gbit"):
            row = found["rows"][label].get(rate)
            if spec not in ("ddp", "none") and row and row["seconds"]:
                text = f"{row['seconds']:.1f} s, {row['over_ddp']:.1f} × as fast as DDP"
                where = f"seconds to a test loss of 0.5, {found['ranks']} ranks, {rate}"
                yield from _told(spec, where, text, path)


def _pareto(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    plan = found["plan"]
    regimes = {
        "scratch": "",
        "trained": " from a trained model",
        "apart": " with packages of its own for each",
    }
    for regime, told in regimes.items():
        where = f"test loss of a language model{told}, {plan['workers']} workers, {plan['steps']} steps"
        for row in found.get("tables", {}).get(regime, {}).values():
            if "spec" in row and row.get("times_fewer_bytes") and row["spec"] != "identity":
                text = f"{row['relative_loss'] - 1:+.1%} against DDP, "
                text += f"{row['times_fewer_bytes']:,.0f} × fewer bytes"
                yield from _told(row["spec"], f"{where} with {row['inner']} inside", text, path)


def _relatives(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    for key, row in found["table"].items():
        inner, _, spec = key.partition(" | ")
        if "relative_loss" in row and spec != "identity":
            fewer = row["times_fewer_bytes"] or float("inf")
            text = f"{row['relative_loss'] - 1:+.1%} against averaged gradients, {fewer:.1f} × fewer bytes"
            where = f"test loss with {inner} inside, {found['plan']['workers']} workers, "
            yield from _told(spec, f"{where}{found['plan']['steps']} steps", text, path)


def _budgets(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    for budget, rows in found["budgets"].items():
        if budget == "float32":
            continue
        best = rows["best uniform"]
        mean = rows["uniform"][best]["mean"]
        off, spread = rows["paired_difference_mean"] / mean, rows["paired_difference_spread"] / mean
        where = f"test loss at {budget} of float32's bytes, {found['plan']['workers']} workers"
        text = f"{off:+.1%} ± {100 * spread:.1f} against the best of one kind for all layers ({best})"
        yield "allocate", (f"`allocate`: {where}", text, f"`{path.name}`")


def _gradiveq(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    spec, cells = found["plan"]["method"], found["cells"]
    seeds = [key.partition(" | ")[2] for key in cells if key.startswith(spec)]
    mine, plain = ([cells[f"{name} | {seed}"] for seed in seeds] for name in (spec, "float32"))
    off = fmean(one["test_loss"] for one in mine) / fmean(one["test_loss"] for one in plain) - 1
    fewer = fmean(one["sent_bytes"] for one in plain) / fmean(one["sent_bytes"] for one in mine)
    where = (
        f"test loss, {found['plan']['workers']} workers, {found['plan']['steps']} steps, {len(seeds)} seeds"
    )
    yield from _told(spec, where, f"{off:+.1%} against float32, {fewer:.1f} × fewer bytes", path)


def _bytes(path: Path) -> Iterator[tuple[str, Row]]:
    found = json.loads(path.read_text())
    plain = found["methods"]["identity"]["bytes"]
    where = f"bytes of a rank in a step, {found['ranks']} ranks in lock-step, {found['steps']} steps"
    for row in found["methods"].values():
        fewer = f", {plain / row['bytes']:.1f} × fewer than float32" if row["bytes"] else ""
        yield from _told(row["text"], where, f"{row['bytes']:,.0f} B{fewer}", path)


def _told(spec: str, where: str, text: str, path: Path) -> Iterator[tuple[str, Row]]:
    """A row of a registered method, also on the page of one that it warms up for; others, such as PyTorch's
    own hooks, have no page."""
    try:
        parse(spec)
    except DistcompError:
        return
    row = (f"`{spec}`: {where}", text, f"`{path.name}`")
    yield spec.partition(":")[0], row
    for inner in re.findall(r"inner=\(?([a-z]\w*)", spec):
        yield inner, row
