"""docs/faults.md: what each fault cost, and the soak."""

from __future__ import annotations

from typing import Any

from benchmarks._tables import Block, markdown, result, source

Row = dict[str, Any]


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def row(fault: Row) -> list[str]:
    losses = f"{fault['loss_before']:.3f} → {fault['loss_after']:.3f}"
    lost = f"{fault['lost_steps']} steps" if fault["lost_steps"] else "nothing"
    named = seconds(fault["detected_s"]) + (f": “{fault['named']}”" if fault["named"] else "")
    return [fault["name"], named, lost, seconds(fault["went_on_s"]), str(fault["workers"]), losses]


def soaked() -> str:
    found = result("soak")
    return (
        f"{found['steps']:,} steps under {len(found['faults'])} faults drawn at random: "
        f"{found['steps_trained_twice']} steps were trained twice, test loss {found['first_loss']:.3f} → "
        f"{found['last_loss']:.3f}. {source(found, 'faults.py --soak 2000')}"
    )


def faults() -> str:
    """Every fault that was tried, and what it cost."""
    found = result("faults")
    head = ["fault", "detected in", "lost", "went on after", "workers", "test loss before → after"]
    table = markdown(head, [row(fault) for fault in found["faults"]])
    about = (
        f"Workers wait {found['timeout_s']:g} s for each other and write a checkpoint every "
        f"{found['checkpoint_every']} steps. {source(found, 'faults.py')}"
    )
    return f"{table}\n\n{about}"


BLOCKS = {"faults": Block(faults, "faults"), "soak": Block(soaked, "soak")}
