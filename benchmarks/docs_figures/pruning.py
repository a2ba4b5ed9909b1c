"""docs/pruning.md: losses, bytes on the wire, small files, hostile files."""

from __future__ import annotations

from typing import Any

from benchmarks._tables import Block, markdown, result, source


def plus_minus(one: dict[str, Any], digits: int = 3) -> str:
    sign = "" if one["spread"] is None else f" ± {one['spread']:.{digits}f}"
    return f"{one['mean']:.{digits}f}{sign}"


def losses() -> str:
    """Every method's remaining weights, loss and accuracy; then the claims; then what shrinking gains."""
    found = result("pruning_table")
    parts = []
    for network, rows in found["table"].items():
        lines = [
            [
                name,
                f"{row['remaining']['mean']:.1%}",
                plus_minus(row["test_loss"]),
                plus_minus(row["difference"]),
                f"{row['test_accuracy']['mean']:.1%}",
                str(row["seeds"]),
            ]
            for name, row in rows.items()
            if "test_loss" in row
        ]
        head = [network, "remaining", "test loss", "above the dense net's", "accuracy", "seeds"]
        parts.append(markdown(head, lines))
    lines = [
        [title, one["setting"], f"{one['remaining']['mean']:.1%}", plus_minus(one["difference"])]
        for title, rows in found["against"].items()
        for one in rows
    ]
    parts.append(markdown(["", "setting", "remaining", "test loss above the other's"], lines))
    lines = [
        [
            f"{network}, {name}",
            f"{row['faster_shrunk']['mean']:.2f} ×",
            f"{row['faster_with_zeros']['mean']:.2f} ×",
            f"{row['shrunk_parameters']['mean']:,.0f}",
            plus_minus(row["difference"]),
        ]
        for network, rows in found["table"].items()
        for name, row in rows.items()
        if "faster_shrunk" in row
    ]
    head = ["", "faster when shrunk", "faster with zeros", "parameters left", "test loss above dense"]
    parts.append(markdown(head, lines))
    return "\n\n".join([*parts, source(found, "pruning_table.py")])


def wire() -> str:
    found = result("pruned_wire")
    lines = [
        [
            arm,
            f"{row['queue_bytes_per_step_frozen']:,.0f}",
            f"{row['fewer_queue_bytes_per_step_frozen']:.1f} ×",
            f"{row['fewer_queue_bytes_per_step']:.1f} ×",
            f"{1e3 * row['step_s_frozen']:.0f} ms",
            " / ".join("never" if one is None else f"{one:.1f} s" for one in row["seconds_to_target"]),
            " / ".join(f"{one:.3f}" for one in row["test_loss"]),
        ]
        for arm, row in found["arms"].items()
        if "step_s_frozen" in row
    ]
    single = found["arms"]["one process, pruned"]
    lines.append(
        ["one process, pruned", "", "", "", "", "", " / ".join(f"{one:.3f}" for one in single["test_loss"])]
    )
    head = ["", "bytes per step", "fewer", "fewer, whole run", "step", f"to loss {found['plan']['target']:g}",
            "test loss, by seed"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{source(found, 'pruned_wire.py')}"


def small() -> str:
    found = result("deep_compression")
    nets: dict[str, list[dict[str, Any]]] = {}
    for key, cell in found["cells"].items():
        nets.setdefault(key.partition(" | ")[0], []).append(cell)
    lines = [
        [
            net,
            f"{sum(cell['smaller'] for cell in cells) / len(cells):.1f} ×",
            f"{sum(cell['accuracy'] for cell in cells) / len(cells):.2%}",
            f"{sum(cell['dense_accuracy'] for cell in cells) / len(cells):.2%}",
            f"{sum(cell['dense_trained_on_accuracy'] for cell in cells) / len(cells):.2%}",
            str(len(cells)),
        ]
        for net, cells in nets.items()
    ]
    head = ["", "smaller", "accuracy", "dense", "dense, trained on", "seeds"]
    return f"{markdown(head, lines)}\n\n{source(found, 'deep_compression.py')}"


def hostile() -> str:
    found = result("fuzz_container")
    grown = found["peak_bytes"] - found["peak_before_bytes"]
    return (
        f"{found['inputs']:,} hostile files: {found['refused']:,} refused, {found['read']:,} read, "
        f"{found['crashed']} crashes; memory grew by {grown / 2**20:.0f} MiB at its peak, with "
        f"{found['limit_bytes'] / 2**20:.0f} MiB allowed for tensors. {source(found, 'fuzz_container.py')}"
    )


BLOCKS = {
    "losses": Block(losses, "pruning_table"),
    "wire": Block(wire, "pruned_wire"),
    "small": Block(small, "deep_compression"),
    "hostile": Block(hostile, "fuzz_container"),
}
