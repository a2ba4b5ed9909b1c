"""docs/compressors.md: every method against the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks._tables import Block, result

RATES = {"10mbit": "10 Mbit/s", "100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", "unshaped": "unshaped"}
Found = dict[str, Any]


def times(ratio: float) -> str:
    """With two digits behind the point near 1, where one would hide who is faster."""
    return f"{ratio:.{1 if ratio >= 2 else 2}f} x"


def source(found: Found, script: str) -> str:
    host = found["host"]
    return (
        f"{host['cpu']} ({host['cores']} cores), torch {found['versions']['torch']}, "
        f"commit {found['commit']}; `benchmarks/{script}.py`."
    )


def table(head: list[str], body: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield f"| {' | '.join(row)} |"


def peers(found: Found) -> Iterator[str]:
    rates = [rate for rate in RATES if rate in found["raw"]["step_s"]]
    body = []
    for label, row in found["rows"].items():
        cells = [label, str(row["steps"] or "not reached"), f"{row['bytes'] / 1e6:.2f} MB"]
        body.append(cells + [_seconds(row[rate]) if rate in row else "-" for rate in rates])
    yield from table(["", "steps", "sent per step", *(RATES[rate] for rate in rates)], body)
    yield ""
    for rate, best in found["best"].items():
        steady, whole = best["seconds"], best["seconds_from_start"]
        yield (
            f"* {RATES[rate]}: the best of distcomp's is {steady['best']}: {_against(steady)}. First steps "
            f"counted as they were: {whole['best']}, {_against(whole)}."
        )
    fate = found["raw"].get("torch_powersgd_on_several_buckets")
    if fate:
        yield f"* PyTorch's PowerSGD on several buckets over Gloo: `{fate}`."
    yield ""
    parameters = found["raw"]["parameters"]
    yield f"{found['ranks']} ranks, {parameters:,} parameters. {source(found, 'peers')}"


def _against(best: Found) -> str:
    stock = best["over_best_stock_hook"]
    over_stock = f", {times(stock)} the best stock hook's" if stock else ""
    return f"{times(best['over_ddp'])} DDP's speed{over_stock}"


def _seconds(one: Found) -> str:
    if one.get("seconds") is None:
        return f"{one['step_s'] * 1000:.0f} ms a step"
    faster = f" ({times(one['over_ddp'])})" if "over_ddp" in one else ""
    return f"{one['seconds']:.1f} s{faster}"


def gradiveq(found: Found) -> Iterator[str]:
    if "structure" in found:
        yield from _structure(found["structure"]["layers"])
    if "link" in found:
        yield from _link(found["link"])
    if "loss" in found:
        arms = found["loss"]["arms"]
        body = [
            [f"`{name}`", _loss(row), f"{row['sent_bytes_per_step'] / 1e3:.0f} kB"]
            for name, row in arms.items()
        ]
        yield from table(["", f"test loss after {found['loss']['steps']} steps", "sent per step"], body)
        yield ""
    yield source(found, "gradiveq_claims")


def _structure(layers: Found) -> Iterator[str]:
    head = [
        "layer", "shape", "slices along", "K", "d (K/d)", "coefficients", "in sample", "held out", "later",
        "random basis, held out", "noise, in sample", "noise, held out",
    ]  # fmt: skip
    body = []
    for name, layer in layers.items():
        for along in ("filter", "place"):
            row = layer[along]
            pca, random, noise = row["PCA"], row["random basis"], row["noise"]
            numbers = [pca["in_sample"], pca["held_out"], pca["held_out_later"]]
            numbers += [random["held_out"], noise["in_sample"], noise["held_out"]]
            shape, dims = "x".join(map(str, layer["shape"])), f"{row['d']} ({row['ratio']:.0f})"
            cells = [f"`{name}`", shape, along, str(row["K"]), dims, str(row["coefficients"])]
            body.append([*cells, *(f"{one:.2f}" for one in numbers)])
    yield from table(head, body)
    yield ""


def _link(link: Found) -> Iterator[str]:
    columns = ("float32_s", "learning_s", "finding_the_bases_s", "compressed_s")
    body = []
    for ranks, row in [*link.get("ranks", {}).items(), (6, link)]:
        faster = [f"{row[f'{what}_times_faster']:.1f} x" for what in ("compressed_phase", "whole_cycle")]
        body.append([str(ranks), *(f"{1000 * row[one]:.0f} ms" for one in columns), *faster])
    head = ["ranks", "float32", "learning", "finding the bases, once a cycle", "compressed"]
    yield f"Aggregation at 100 Mbit/s, {link['parameters']:,} parameters, `{link['cycle']}`:"
    yield ""
    yield from table([*head, "compressed phase", "whole cycle"], body)
    yield ""


def _loss(row: Found) -> str:
    """Mean and spread over seeds."""
    return f"{row['mean']:.3f} ± {row['spread']:.3f}"


def allocation(found: Found) -> Iterator[str]:
    body = []
    for budget, row in found["budgets"].items():
        alone = budget == "float32"
        arms = {"float32": row} if alone else {"allocate": row["allocate"], **row["uniform"]}
        for name, one in arms.items():
            share = "-" if alone else budget
            body.append([share, name, _loss(one), f"{one['sent_bytes_per_step']:,.0f}"])
    yield from table(["budget", "", "test loss", "bytes sent per step"], body)
    yield ""
    yield (
        f"Lower than the best uniform setting on {found['lower_on']}. Mean and spread of "
        f"{found['plan']['seeds']} seeds. {source(found, 'allocation')}"
    )


def block(write: Callable[[Found], Iterator[str]], name: str) -> Block:
    """Lines of a table, with an empty line before and after."""
    return Block(lambda: "\n" + "\n".join(write(result(name))) + "\n", name)


BLOCKS = {
    "peers": block(peers, "peers"),
    "gradiveq_claims": block(gradiveq, "gradiveq_claims"),
    "allocation": block(allocation, "allocation"),
}
