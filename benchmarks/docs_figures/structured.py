"""docs/structured.md and docs/blocks.md: structures, claims, codecs, speed, files; blocks and fast
convolutions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks._common import mean_and_spread
from benchmarks._tables import Block, markdown, result, source


def percent(one: dict[str, Any], signed: bool = False) -> str:
    spread = "" if one["spread"] is None else f" ± {100 * one['spread']:.1f}"
    return f"{100 * one['mean']:{'+' if signed else ''}.1f}{spread}"


def structures() -> str:
    """Every structure beside dense, and beside the narrow network of as many parameters."""
    found, parts = result("structured_table"), []
    for task, rows in found["table"].items():
        lines = []
        for name, row in rows.items():
            narrow = "narrow" in row
            lines.append(
                [
                    name,
                    f"{row['parameters']:,}",
                    percent(row["accuracy"]),
                    f"{row['narrow_parameters']:,}" if narrow else "",
                    percent(row["narrow"]) if narrow else "",
                    percent(row["above_narrow"], signed=True) if narrow else "",
                    str(row["accuracy"]["seeds"]),
                ]
            )
        head = [
            task,
            "parameters",
            "accuracy, %",
            "plain: parameters",
            "plain: accuracy",
            "above plain",
            "seeds",
        ]
        parts.append(markdown(head, lines))
    return "\n\n".join([*parts, source(found, "structured_table.py")])


def claims() -> str:
    """The means of each claim's rows over the seeds that are there."""
    found, parts = result("structured_table"), []
    for claim in CLAIMS:
        cells = [cell for key, cell in found["cells"].items() if key.startswith(f"{claim} | ")]
        if cells:
            lines = [[row, text] for row, text in _means(cells)]
            parts.append(markdown([f"{claim} (seeds: {len(cells)})", ""], lines))
    return "\n\n".join([*parts, source(found, "structured_table.py")])


CLAIMS = (
    "LC", "one-shot Tucker-2", "one-shot Tucker-2 of a longer trained base", "global error reconstruction",
    "force regularization", "soft weight-sharing", "SplitNet", "sparse bases",
)  # fmt: skip
SHARES = (
    "dense", "compressed", "LC", "after", "fine", "same", "SVD", "reconstructed", "trained", "soft", "pruned",
    "accuracy", "rank 6", "nonzero", "classes", "pixels", "plain",
)  # fmt: skip


def _means(cells: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    for key, value in cells[0].items():
        values = [cell[key] for cell in cells if key in cell]
        if isinstance(value, dict):
            for inner, text in _means(values):
                yield f"strength {key}: {inner}", text
        elif isinstance(value, list):
            yield key, "; ".join(", ".join(map(str, one)) for one in values)
        else:
            digits = ",.0f" if statistics.mean(values) >= 1000 else ".3g"
            spread = f" ± {statistics.stdev(values):{digits}}" if len(set(values)) > 1 else ""
            share = key.startswith(SHARES) and "gap" not in key and "parameters" not in key
            if share:
                spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                yield key, f"{100 * statistics.mean(values):.1f} %{spread}"
            else:
                yield key, f"{statistics.mean(values):{digits}}{spread}"


def codecs() -> str:
    """Bits a step and rank, and accuracy, of structure times codec."""
    found = result("structured_codecs")
    lines = [
        [
            row["structure"],
            row["method"],
            f"{row['parameters']:,}",
            f"{8 * row['bytes_per_step'] / 1000:,.1f}",
            percent(mean_and_spread(row["accuracy"])),
            str(len(row["accuracy"])),
        ]
        for row in found["rows"].values()
    ]
    head = ["structure", "method", "parameters", "kbit a step and rank", "accuracy, %", "seeds"]
    return f"{markdown(head, lines)}\n\n{source(found, 'structured_codecs.py')}"


def speed() -> str:
    """Circulant dense layers by size, and convolutions by block of channels."""
    found = result("structured_speed")
    lines = []
    for size, row in found["dense_layers"].items():
        ways = {way: f"{way}: forward_s" for way in ("dense", "by FFT", "by index")}
        times = [f"{1e3 * row[key]:.2f}" if key in row else "" for key in ways.values()]
        faster = [
            f"{row[f'dense: {what}'] / row[f'by FFT: {what}']:.1f} ×" for what in ("forward_s", "both_s")
        ]
        lines.append([size, *times, *faster])
    head = [
        "one circulant of",
        "dense, ms",
        "by FFT, ms",
        "by index, ms",
        "FFT faster: forward",
        "with backward",
    ]
    dense_s = found["channel_blocks"]["dense"]["forward_s"]
    blocks = [
        [name, f"{1e3 * row['forward_s']:.2f}", f"{dense_s / row['forward_s']:.2f} ×"]
        for name, row in found["channel_blocks"].items()
    ]
    text = (
        "Dense layers, batch 64:",
        markdown(head, lines),
        "A 3 × 3 convolution of 128 channels on 14 × 14, batch 8:",
    )
    return "\n\n".join([*text, markdown(["blocks of channels", "forward, ms", "faster"], blocks),
                        source(found, "structured_speed.py")])  # fmt: skip


def at_rest() -> str:
    """Files of trained networks, by way of packing."""
    found, parts = result("structured_files"), []
    for network in dict.fromkeys(key.partition(" | ")[0] for key in found["cells"]):
        cells = [cell for key, cell in found["cells"].items() if key.startswith(f"{network} | ")]
        lines = [
            [
                name,
                f"{statistics.mean(cell[name]['times_smaller'] for cell in cells):.1f} ×",
                percent(mean_and_spread([cell[name]["accuracy"] for cell in cells])),
                str(len(cells)),
            ]
            for name in cells[0]
        ]
        parts.append(markdown([network, "smaller", "accuracy, %", "seeds"], lines))
    return "\n\n".join([*parts, source(found, "structured_files.py")])


def block_rows() -> str:
    found = result("blocks_table")
    lines = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['multiplications'] / 1000:,.0f}",
            f"{1e3 * found['step_s'][name]:.1f}" if name in found.get("step_s", {}) else "",
            percent(row["accuracy"]),
            str(row["accuracy"]["seeds"]),
        ]
        for name, row in found["table"].items()
    ]
    head = ["network", "parameters", "kMAC an image", "ms a step", "accuracy, %", "seeds"]
    return f"{markdown(head, lines)}\n\n{source(found, 'blocks_table.py')}"


def fast() -> str:
    found = result("structured_speed")
    lines = [
        [
            name,
            f"{row['fewer multiplications']:.2f} ×" if "fewer multiplications" in row else "",
            *(f"{row[f'{kind} error']:.1e}" for kind in ("float32", "bf16", "8 bits")),
            f"{1e3 * row['forward_s']:.1f}",
        ]
        for name, row in found["winograd"].items()
    ]
    head = [
        "3 × 3, 64 channels, 32 × 32",
        "fewer multiplications",
        "error, float32",
        "bf16",
        "8 bits",
        "forward, ms",
    ]
    memory = [
        [
            name,
            f"{row['im2col_bytes'] / 1e6:.2f}",
            f"{row['mec_bytes'] / 1e6:.2f}",
            f"{row['im2col_bytes'] / row['mec_bytes']:.2f} ×",
            *(f"{1e3 * row[key]:.2f}" for key in ("mec_s", "im2col_s", "PyTorch_s")),
        ]
        for name, row in found["mec"].items()
    ]
    lowered = ["convolution", "im2col, MB", "MEC, MB", "less", "MEC, ms", "im2col, ms", "PyTorch, ms"]
    return "\n\n".join(
        [markdown(head, lines), markdown(lowered, memory), source(found, "structured_speed.py")]
    )


def accnet() -> str:
    found = result("structured_speed")
    lines = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['relative error']:.3f}",
            f"{row['of the unfiltered image']:.3f}",
        ]
        for name, row in found["accnet"].items()
    ]
    head = ["a bilateral filter, imitated", "parameters", "relative error", "of the unfiltered image"]
    return f"{markdown(head, lines)}\n\n{source(found, 'structured_speed.py')}"


BLOCKS = {
    "structures": Block(structures, "structured_table"),
    "claims": Block(claims, "structured_table"),
    "codecs": Block(codecs, "structured_codecs"),
    "speed": Block(speed, "structured_speed"),
    "at rest": Block(at_rest, "structured_files"),
}

OF_BLOCKS = {
    "blocks": Block(block_rows, "blocks_table"),
    "fast": Block(fast, "structured_speed"),
    "accnet": Block(accnet, "structured_speed"),
}
