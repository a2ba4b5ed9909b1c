"""docs/updates.md: sizes of updates, memory, the example, hostile updates; docs/collectives.md's pipeline."""

from __future__ import annotations

from benchmarks._tables import Block, markdown, result, source


def sizes() -> str:
    """Every format's factor at every rate."""
    found = result("updates_bytes")
    table = found["table"]
    formats = list(next(iter(table.values()))["smaller"])
    rows = [["words changed", *(f"{row['changed']:.2%}" for row in table.values())]]
    for name in formats:
        rows.append([name, *(f"{row['smaller'][name]['mean']:.1f} ×" for row in table.values())])
    rows.append(["the same bits after 200", *("yes" if row["identical"] else "NO" for row in table.values())])
    head = ["", *(f"rate {rate}" for rate in table)]
    seeds = next(iter(table.values()))["seeds"]
    return f"{markdown(head, rows)}\n\nMeans of {seeds} seeds. {source(found, 'updates_bytes.py')}"


def memory() -> str:
    found = result("updates_memory")
    rows = [
        [
            name,
            f"{row['smaller']:.1f} ×",
            f"{row['encode_copies']:.2f}",
            f"{row['apply_copies']:.2f}",
        ]
        for name, row in found["rows"].items()
    ]
    head = ["", "smaller", "copies of the model, encode", "apply"]
    about = "Copies count the versions themselves: two for encode, one for apply."
    return f"{markdown(head, rows)}\n\n{about} {source(found, 'updates_memory.py')}"


def grpo() -> str:
    found = result("updates_grpo")
    rows = [
        [
            f"rate {rate}",
            ", ".join(f"{reward:.3f}" for reward in row["rewards"]),
            "yes" if row["same_rewards"] else "NO",
            f"{row['smaller']:.1f} × fewer",
        ]
        for rate, row in found["table"].items()
    ]
    head = ["", "reward after 40 steps, seed by seed", "the same with whole weights", "bytes"]
    seeds, planned = min(row["seeds"] for row in found["table"].values()), found["plan"]["seeds"]
    of = f"{seeds} of the {planned} seeds planned" if seeds < planned else f"{seeds} seeds"
    return f"{markdown(head, rows)}\n\nWith {of}. {source(found, 'updates_grpo.py')}"


def fuzz() -> str:
    found = result("fuzz_updates")
    return (
        f"{found['inputs']:,} updates: {found['applied']:,} applied, {found['refused']:,} refused, "
        f"{found['crashed']} crashed; peak memory {found['peak_bytes'] / 2**20:.0f} MiB. "
        f"{source(found, 'fuzz_updates.py')}"
    )


def pipeline() -> str:
    found = result("pipeline_loss")
    rows = [
        [
            "float32" if codec == "none" else f"`{codec}`",
            f"{row['mean']:.3f}",
            f"{row['above']['mean']:+.4f} ({' to '.join(f'{end:+.4f}' for end in row['above']['range'])})",
            f"{row['bytes_per_microbatch']:,}",
            f"{row['smaller']:.1f} ×",
        ]
        for codec, row in found["table"].items()
    ]
    head = ["codec, both ways", "test loss", "above float32", "bytes of a microbatch, each way", "fewer"]
    seeds = len(next(iter(found["table"].values()))["test_losses"])
    about = f"{found['plan']['steps']} steps, {seeds} seeds. {source(found, 'pipeline_loss.py')}"
    return f"{markdown(head, rows)}\n\n{about}"


COLLECTIVES = {"pipeline": Block(pipeline, "pipeline_loss", key="table")}

BLOCKS = {
    "updates sizes": Block(sizes, "updates_bytes"),
    "updates memory": Block(memory, "updates_memory"),
    "updates grpo": Block(grpo, "updates_grpo", key="table"),
    "updates fuzz": Block(fuzz, "fuzz_updates"),
}
