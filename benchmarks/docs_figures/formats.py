"""docs/compressors.md: floats of few bits, and the lossless stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks._tables import Block, result
from benchmarks.docs_figures.comparisons import RATES, Found, block, source, table, times


def errors(found: Found) -> Iterator[str]:
    body = [
        [
            f"`{name}`",
            f"{row['bits_per_value']:.2f}",
            f"{row['error']:.2e}",
            "yes" if row["unbiased"] else "no",
        ]
        for name, row in found["errors"].items()
    ]
    yield from table(["compressor", "bits per value", "relative squared error", "unbiased"], body)
    yield ""
    yield f"A gradient of `examples/bytes_lm.py` after 30 steps, one draw. {source(found, 'formats')}"


def losses(found: Found) -> Iterator[str]:
    body = [
        [f"`{name}`", f"{row['mean']:.3f} ± {row['spread']:.3f}", f"{row['sent_bytes_per_step']:,.0f}"]
        for name, row in found["losses"].items()
    ]
    yield from table(["method", "test loss", "bytes sent per step"], body)
    plan = found["plan"]
    yield ""
    yield (
        f"{plan['workers']} workers, {plan['steps']} steps, mean and spread of {plan['seeds']} seeds, the "
        f"rates the same for all but DeMo's. {source(found, 'formats')}"
    )


def lossless_bytes(found: Found) -> Iterator[str]:
    coders = [name for name, of in found["bytes"][0].items() if isinstance(of, dict)]
    head = ["payload of", "bits per value"]
    head += [words for coder in coders for words in (f"{coder}: stays", "encode, decode")]
    body = []
    for row in found["bytes"]:
        cells = [row["compressor"], f"{row['bits_per_value']:.2f}" if "bits_per_value" in row else "8"]
        for coder in coders:
            one = row[coder]
            cells += [
                f"{one['ratio']:.3f}",
                f"{one['encode_mb_per_s']:,.0f}, {one['decode_mb_per_s']:,.0f} MB/s",
            ]
        body.append(cells)
    yield from table(head, body)
    yield ""
    yield (
        "Shares of the bytes, the mean over gradients after 10, 30 and 60 steps; speeds of the codes alone, "
        f"on one thread. {source(found, 'lossless')}"
    )


def lossless_steps(found: Found) -> Iterator[str]:
    rates = [rate for rate in RATES if any(row["rate"] == rate for row in found["steps"])]
    rows = {(row["method"], row["rate"]): row for row in found["steps"]}
    body = []
    for method in dict.fromkeys(row["method"] for row in found["steps"]):
        cells = [f"`{method}`"]
        for rate in rates:
            row = rows.get((method, rate))
            cells.append(
                "-" if row is None else f"{1e3 * row['step_s']:,.0f} ms{_against(rows, method, rate)}"
            )
        some = next(row for row in found["steps"] if row["method"] == method)
        body.append([*cells, f"{some['sent_bytes'] / 1e3:,.0f} kB"])
    yield from table(["method", *(RATES[rate] for rate in rates), "sent per step"], body)
    yield ""
    ranks, steps = found["steps"][0]["ranks"], found["steps"][0]["steps"]
    yield f"Median of {steps} steps, {ranks} ranks; in brackets against the same without the stage. The"
    yield f"weights at the end are the same to the bit with it and without. {source(found, 'lossless')}"


def lossless_advice(found: Found) -> Iterator[str]:
    for row in found["advice"]:
        best = sorted(row["rows"], key=lambda one: -one["speed_up"])[:3]
        speeds = ", ".join(f"`{one['method']}` {times(one['speed_up'])}" for one in best)
        yield f"* {RATES[row['rate']]}: {row['sentence']} Predicted against plain DDP: {speeds}."
    yield ""
    yield source(found, "lossless")


def _against(rows: dict[tuple[str, str], Found], method: str, rate: str) -> str:
    """How many times as fast as the method within; nothing for one that has none."""
    inner = method.removeprefix("lossless:inner=(").partition(")")[0]
    plain, own = rows.get((inner, rate)), rows.get((method, rate))
    if plain is None or own is None or inner == method:
        return ""
    return f" ({times(plain['step_s'] / own['step_s'])})"


def keyed(write: Callable[[Found], Iterator[str]], name: str, key: str) -> Block:
    """Lines of a table, once that part has been measured."""
    return Block(lambda: "\n" + "\n".join(write(result(name))) + "\n", name, key=key)


BLOCKS: dict[str, Block] = {
    "format_errors": block(errors, "formats"),
    "format_losses": block(losses, "formats"),
    "lossless_bytes": block(lossless_bytes, "lossless"),
    "lossless_steps": keyed(lossless_steps, "lossless", "steps"),
    "lossless_advice": keyed(lossless_advice, "lossless", "advice"),
}
