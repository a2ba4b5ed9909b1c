"""The measured rows of README.md, and docs/measured.md."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks._tables import Block, markdown, measured, result, source

Row = dict[str, Any]


LOW_PRECISION = ("DoReFa 1-2-6, qsgd:bits=6", "float32, DDP")


def loss(row: Row) -> str:
    """Relative to DDP, with the spread of the paired differences."""
    spread = row["paired_difference_spread"] * row["relative_to_ddp"] / row["mean"]
    return f"{100 * (row['relative_to_ddp'] - 1):+.1f} % ± {100 * spread:.1f}"


def readme() -> str:
    steps, overhead, losses = result("step_time_100mbit"), result("overhead"), result("digit_pairs")

    def exchange(method: str, label: str) -> list[str]:
        row, ddp = steps["methods"][method], steps["methods"]["ddp"]
        fewer = ddp["payload_bytes"] / row["payload_bytes"]
        faster = f"{row['speed_up_over_ddp']:.1f} × faster"
        return [label, f"{fewer:.1f} × fewer", faster, loss(losses["methods"][method])]

    low_row, low_about = low_precision()
    loses = f"where it loses: `identity`, {overhead['ranks']} ranks, fast network"
    slower = f"a step takes {100 * (overhead['ratio'] - 1):+.1f} %"
    table = markdown(
        ["", "bytes sent", "exchange", "test loss"],
        [
            exchange("qsgd:bits=4", "`qsgd(bits=4)`"),
            exchange("qsgd:bits=1", "`qsgd(bits=1)`, error feedback"),
            *low_row,
            [loses, "as many", slower, "same bits"],
        ],
    )
    about = (
        f"{source(steps, 'step_time.py')[:-1]} and `overhead.py`: the exchange of "
        f"{steps['gradient_bytes'] / 1e6:.0f} MB of gradients between {steps['ranks']} ranks on an emulated "
        f"{steps['rate']} network, against DDP's fp32 all-reduce in the same run. Test loss: pairs of "
        f"digits, {losses['ranks']} workers, {losses['steps']} steps, mean of {losses['seeds']} seeds ± "
        "standard deviation of the differences to DDP seed by seed; training without communication: "
        f"{loss(losses['methods']['none'])} (`benchmarks/digit_pairs.py`).{low_about}"
    )
    return f"{table}\n\n{textwrap.fill(about, 118, break_on_hyphens=False, break_long_words=False)}"


def low_precision() -> tuple[list[list[str]], str]:
    """The row of low precision with a compressed wire, and its footnote; nothing before it is measured."""
    if not measured("precision_wire"):
        return [], ""
    found = result("precision_wire")
    both, plain = (found["table"][name] for name in LOW_PRECISION)
    row = [
        "low precision + compressed wire: `dorefa(1, 2, 6)`, `qsgd(bits=6)`",
        f"{both['times_fewer_bytes']:.1f} × fewer",
        f"{both['speed_up_over_ddp']:.1f} × faster",
        f"{both['mean']:.3f}; in float32 {plain['mean']:.3f}",
    ]
    plan = found["plan"]
    return [row], (
        " Low precision: weights of 1 bit, activations of 2 and gradients of 6 in the loop, 6 bits on the "
        f"wire; {plan['ranks']} ranks, {plan['steps']} steps, mean test loss of {plan['seeds']} seeds "
        "(`benchmarks/precision_wire.py`)."
    )


def exchanges(name: str, arguments: str) -> str:
    """Each method's exchange against the time of its bytes, and against DDP, as ``arguments`` measured it."""
    found = result(name)
    rows = [
        [
            f"`{method}`",
            f"{row['payload_bytes'] / 1e6:.2f} MB",
            f"{1e3 * row['predicted_s']:.0f} ms",
            f"{1e3 * row['exchange_s']:.0f} ms",
            f"{row['ratio']:.2f}",
            f"{row['queue_over_predicted']:.3f}",
            f"{row['speed_up_over_ddp']:.1f} ×",
        ]
        for method, row in found["methods"].items()
    ]
    head = ["method", "payload", "its bytes take", "exchange", "ratio", "queue / predicted bytes", "over DDP"]
    return f"{markdown(head, rows)}\n\n{source(found, f'step_time.py {arguments}')}"


def bounds() -> str:
    """Each method's exchange against its bound."""
    found = result("step_bounds_100mbit")
    rows = [
        [
            f"`{method}`",
            f"{row['payload_bytes'] / 1e6:.3f} MB",
            f"{1e3 * row['predicted_s']:.0f} ms",
            f"{1e3 * found['ranks'] * row['cpu_s'] / found['host']['cores']:.0f} ms",
            f"{1e3 * row['floor_s']:.0f} ms",
            f"{1e3 * row['exchange_s']:.0f} ms",
            f"{row['over_bound']:.2f}",
        ]
        for method, row in found["methods"].items()
    ]
    head = ["method", "payload", "its bytes take", "its CPU takes", "floor", "exchange", "over the bound"]
    return f"{markdown(head, rows)}\n\n{source(found, 'step_time.py --bounds')}"


def losses() -> str:
    found = result("digit_pairs")
    rows = [
        [
            f"`{method}`",
            f"{row['mean']:.4f} ± {row['spread']:.4f}",
            f"{row['paired_difference_mean']:+.5f} ± {row['paired_difference_spread']:.5f}",
            f"{row['test_accuracy_mean']:.1%}",
        ]
        for method, row in found["methods"].items()
    ]
    head = ["method", "test loss", "difference to DDP, seed by seed", "accuracy"]
    return f"{markdown(head, rows)}\n\n{source(found, 'digit_pairs.py')}"


def codecs() -> str:
    """Encoding, decoding and error feedback in units of a copy; what they were before, in brackets."""
    found = result("compressors")
    runs = [(key, found[key]) for key in found if key.startswith("cpu_")]
    before = found.get("before", {})

    def cell(key: str, name: str, way: str) -> str:
        rows = found[key]["rows"][name]
        old = before.get(key, {}).get("rows", {}).get(name, {})
        if way not in rows:
            return ""
        return f"{rows[way]['copies']:.2f}" + (f" ({old[way]['copies']:.2f})" if way in old else "")

    ways = [(key, way) for key, _ in runs for way in ("encode", "decode", "owe")]
    names = [name for name, row in runs[0][1]["rows"].items() if "encode" in row]
    called = {"owe": "error feedback"}
    head = [
        f"{called.get(way, way)}, {key.removeprefix('cpu_')} thread{'s' * (key != 'cpu_1')}"
        for key, way in ways
    ]
    rows = [[name, *(cell(key, name, way) for key, way in ways)] for name in names]
    copies = ", ".join(f"{1e3 * run['copy_s']:.1f} ms" for _, run in runs)
    gpu = found["gpu"] if isinstance(found["gpu"], str) else found["gpu"]["name"]
    old = f" In brackets: commit {before['commit']}, measured in the same run." if before else ""
    about = f"The copy takes {copies}. GPU: {gpu}.{old} {source(found, 'compressors.py')}"
    return f"{markdown(['compressor', *head], rows)}\n\n{about}"


def attached() -> str:
    """Steps with a method attached over the same without, where the network costs nothing."""
    found = result("overhead")
    rows = [
        [
            ranks,
            f"`{method}`",
            f"{1e3 * row['bare_s']:.0f} ms",
            f"{1e3 * row['step_s']:.0f} ms",
            f"{row['ratio']:.3f}",
            f"{row['cpu']:.3f}",
        ]
        for ranks, methods in found["by_ranks"].items()
        for method, row in methods.items()
    ]
    head = ["ranks", "attached", "step without", "step with", "time, pair by pair", "CPU time, pair by pair"]
    return f"{markdown(head, rows)}\n\n{source(found, 'overhead.py')}"


def profile() -> str:
    """CPU time of a step by phase, and of what carries it over both carriers."""
    found = result("exchange_profile")
    rows = [
        [
            rate,
            f"`{method}`",
            *(f"{1e3 * own[phase]:.0f}" if phase in own else "" for phase in ("encode", "recode", "decode")),
            f"{1e3 * gloo['carrier']:.0f}",
            f"{1e3 * own['carrier']:.0f}",
            f"{gloo['wakes']:,.0f}",
            f"{own['wakes']:,.0f}",
        ]
        for rate, carriers in found["rates"].items()
        for method, own in carriers["sockets"].items()
        for gloo in [carriers["gloo"][method]]
    ]
    head = [
        "network", "method", "encode", "recode", "decode", "carried by Gloo", "by distcomp", "wakes of Gloo",
        "of distcomp",
    ]  # fmt: skip
    return f"{markdown(head, rows)}\n\n{source(found, 'exchange_profile.py')}"


def cores() -> str:
    """Seconds of a core that an exchange costs a rank, before and after."""
    found = result("exchange_cores")
    rows = [
        [
            f"`{name.removeprefix('core, ')}`",
            f"{1e3 * row['before']:.1f}",
            f"{1e3 * row['after']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for name, row in found["rows"].items()
    ]
    (older,) = {row["before_commit"] for row in found["rows"].values()}
    head = ["method", f"commit {older}", "now", "ratio"]
    return f"{markdown(head, rows)}\n\n{source(found, 'before_after.py')}"


def _exchanges(name: str, arguments: str) -> Block:
    return Block(lambda: exchanges(name, arguments), name)


README: dict[str, Block] = {"measured": Block(readme, "step_time_100mbit", "overhead", "digit_pairs")}

BLOCKS: dict[str, Block] = {
    "exchanges": _exchanges("step_time_100mbit", "--rate 100mbit"),
    "exchanges 2 ranks": _exchanges("step_time_100mbit_2_ranks", "--rate 100mbit --ranks 2"),
    "exchanges 1gbit": _exchanges("step_time_1gbit", "--rate 1gbit"),
    "bounds": Block(bounds, "step_bounds_100mbit"),
    "attached": Block(attached, "overhead"),
    "profile": Block(profile, "exchange_profile"),
    "cores": Block(cores, "exchange_cores"),
    "losses": Block(losses, "digit_pairs"),
    "codecs": Block(codecs, "compressors"),
}
