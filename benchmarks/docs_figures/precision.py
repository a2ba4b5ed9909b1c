"""docs/precision.md: losses, claims, bytes on the wire, packed layers."""

from __future__ import annotations

from benchmarks._tables import Block, markdown, result, source


def spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.3f}"


def losses() -> str:
    """Every method's test loss, and its difference to float32 seed by seed."""
    found = result("precision_table")
    tables = []
    for network, rows in found["table"].items():
        lines = [
            [
                name,
                " / ".join(f"{bits:g}" for bits in row["bits"]),
                f"{row['mean']:.3f}{spread(row['spread'])}" if "mean" in row else "diverged",
                f"{row['paired_difference_mean']:+.3f}{spread(row['paired_difference_spread'])}"
                if "mean" in row
                else "",
                str(row["seeds"] - row["diverged"]),
            ]
            for name, row in rows.items()
        ]
        head = [network, "bits: weights / activations / gradients", "test loss", "difference", "seeds"]
        tables.append(markdown(head, lines))
    return "\n\n".join([*tables, source(found, "precision_table.py")])


def claims() -> str:
    """What papers lead one to expect, network by network, seed by seed."""
    found = result("precision_table")
    lines = [
        [
            claim if place == 0 else "",
            network,
            f"{row['gap']:+.3f}{spread(row['spread'])}",
            f"{row['seeds_for']} of {row['seeds']}",
        ]
        for claim, networks in found["claims"].items()
        for place, (network, row) in enumerate(networks.items())
    ]
    return markdown(["expected", "network", "test loss, worse minus better", "seeds that agree"], lines)


def wire() -> str:
    found = result("precision_wire")
    lines = [
        [
            name,
            f"{row['bytes_per_step']:,.0f}",
            f"{row['times_fewer_bytes']:.1f} ×" if "times_fewer_bytes" in row else "",
            f"{1e3 * row['exchange_s']:.1f} ms" if row["bytes_per_step"] else "",
            f"{row['mean']:.3f}{spread(row['spread'])}",
        ]
        for name, row in found["table"].items()
    ]
    head = ["", "bytes sent per step", "fewer", "exchange", "test loss"]
    same = "the same" if found["same_bits"] else "NOT the same"
    equal = f"Weights of the fixed-point run over {'; '.join(found['fixed_point_weights'])}: {same} bits."
    return f"{markdown(head, lines)}\n\n{equal} {source(found, 'precision_wire.py')}"


def binary() -> str:
    found = result("binary_layers")
    lines = [
        [
            name,
            f"{1e3 * row['float32_s']:.2f} ms",
            f"{1e3 * row['packed_s']:.2f} ms",
            f"{row['ratio']:.1f} ×",
            f"{row['weights_smaller']:.0f} ×",
        ]
        for name, row in found["layers"].items()
    ]
    head = ["layer", "torch, float32", "packed", "faster", "smaller weights"]
    return f"{markdown(head, lines)}\n\n{source(found, 'binary_layers.py')}"


BLOCKS = {
    "claims": Block(claims, "precision_table", key="claims"),
    "losses": Block(losses, "precision_table", key="table"),
    "wire": Block(wire, "precision_wire", key="same_bits"),
    "binary": Block(binary, "binary_layers", key="layers"),
}
