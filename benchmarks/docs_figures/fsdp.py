"""docs/fsdp.md: bytes, time, memory and loss of sharded training, and predictions beside measurements."""

from __future__ import annotations

from typing import Any

from benchmarks._tables import Block, markdown, result, source

RATES = {"100mbit": "100 Mbit/s", "30mbit": "30 Mbit/s", "1gbit": "1 Gbit/s"}


def bytes_sent() -> str:
    """Bytes per parameter, rank and step of every combination that was measured."""
    found = result("sharded_bytes")
    two, four = (found["cells"][f"{ranks} ranks"]["rows"] for ranks in (2, 4))
    rows = []
    for name, row in two.items():
        gradients, _, weights = name.partition(" | ")
        told = [f"{value:.2f}" if value is not None else "" for value in _of(row, four[name])]
        method = gradients if gradients == "plain FSDP2" else f"`{gradients}`"
        rows.append([method, "" if weights in ("", "plain") else f"`{weights}`", *told])
    head = ["gradients", "`weights=`", "2 ranks", "ledger", "4 ranks", "ledger", "kept"]
    return f"{markdown(head, rows)}\n\n{source(found, 'sharded_bytes.py')}"


def _of(two: dict[str, float], four: dict[str, float]) -> list[float | None]:
    return [
        two["interface"], two.get("ledger"), four["interface"], four.get("ledger"),
        two.get("state_bytes_per_parameter"),
    ]  # fmt: skip


def times() -> str:
    """Step times and memory beside plain FSDP2, at 100 Mbit/s and at 1 Gbit/s."""
    parts = []
    for rate in ("100mbit", "1gbit"):
        found = result(f"sharded_time_{rate}")
        sizes = list(dict.fromkeys(key.partition(" | ")[0] for key in found["table"]))
        names = list(dict.fromkeys(key.partition(" | ")[2] for key in found["table"]))
        rows = [
            [name, *(one for size in sizes for one in _timed(found["table"], size, name))] for name in names
        ]
        head = (f"{size}: {what}" for size in sizes for what in ("a step", "faster", "kept", "memory"))
        parts += [markdown([RATES[rate], *head], rows), source(found, "sharded_time.py")]
    return "\n\n".join(parts)


def _timed(table: dict[str, dict[str, float]], size: str, name: str) -> list[str]:
    row = table.get(f"{size} | {name}")
    if row is None:
        return [""] * 4
    return [
        f"{row['step_s']:.2f} s", f"{row['speed_up']:.1f} ×", f"{row['state_bytes_per_parameter']:.2f}",
        f"{row['resident_over_plain_per_parameter']:+.1f}",
    ]  # fmt: skip


def losses() -> str:
    """Test losses beside plain FSDP2's, paired by seed."""
    found = result("sharded_loss")
    parts = []
    for task, table in found["table"].items():
        plain = next(iter(table.values()))["mean"]
        rows = [
            [name, f"{row['mean']:.3f} ± {row['spread']:.3f}", _relative(row, plain)]
            for name, row in table.items()
        ]
        parts.append(markdown([task, "test loss", "against plain, seed by seed"], rows))
    return "\n\n".join([*parts, source(found, "sharded_loss.py")])


def _relative(row: dict[str, float], plain: float) -> str:
    mean, spread = row["paired_difference_mean"] / plain, row["paired_difference_spread"] / plain
    return f"{100 * mean:+.1f} % ± {100 * spread:.1f}"


def feedback() -> str:
    """One bit with and without a residual, at three learning rates."""
    found = result("feedback_adam")
    rows = []
    for key, row in found["table"].items():
        optimizer, method = key.split(" | ")
        rows.append(
            [
                optimizer,
                f"`{method}`",
                ", ".join(f"{rate}: {loss:.2f}" for rate, loss in row["by_rate"].items()),
                str(row["seeds"]),
            ]
        )
    head = ["optimizer", "gradients", "test loss by learning rate", "seeds"]
    return f"{markdown(head, rows)}\n\n{source(found, 'feedback_adam.py')}"


def predictions() -> str:
    """Predicted and measured steps."""
    found = result("sharded_advice")
    rows = [_predicted(key, row) for key, row in found["table"].items()]
    said = []
    for rate, name in RATES.items():
        errors = [abs(row["error"]) for key, row in found["table"].items() if key.startswith(f"{rate} ")]
        within = sum(error <= 0.1 for error in errors)
        if errors:
            said.append(
                f"At {name} {within} of {len(errors)} are within 10 %, the worst {max(errors):.0%} off."
            )
    head = ["network", "", "setting", "predicted", "measured", "off by"]
    return f"{markdown(head, rows)}\n\n{' '.join(said)}\n\n{source(found, 'sharded_advice.py')}"


def _predicted(key: str, row: dict[str, float]) -> list[str]:
    rate, group, setting = key.split(" | ")
    shown = [f"{row['predicted_s']:.2f} s", f"{row['measured_s']:.2f} s", f"{row['error']:+.0%}"]
    return [RATES[rate], group, f"`{setting}`", *shown]


def audited() -> str:
    """What an audit says a step sends, and what the interface has counted."""
    found = result("sharded_audit")
    rows: list[list[Any]] = [
        [
            name, f"{cell['audited_bytes'] / 1e6:.2f} MB", f"{cell['interface_payload_bytes'] / 1e6:.2f} MB",
            f"{cell['audited_bytes'] / cell['interface_payload_bytes'] - 1:+.1%}",
        ]
        for name, cell in found["cells"].items()
    ]  # fmt: skip
    head = ["4 ranks, 3 steps", "audited", "interface, without headers", "off by"]
    return f"{markdown(head, rows)}\n\n{source(found, 'sharded_audit.py')}"


BLOCKS = {
    "sharded_bytes": Block(bytes_sent, "sharded_bytes"),
    "sharded_time": Block(times, "sharded_time_1gbit", key="table"),
    "sharded_loss": Block(losses, "sharded_loss", key="table"),
    "feedback": Block(feedback, "feedback_adam", key="table"),
    "sharded_advice": Block(predictions, "sharded_advice", key="table"),
    "sharded_audit": Block(audited, "sharded_audit"),
}
