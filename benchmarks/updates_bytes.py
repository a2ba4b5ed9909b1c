"""How small is an update? The byte-level language model under AdamW, every step published, 200 in a chain.

    python -m benchmarks.updates_bytes             # minutes; resumes; writes results/updates_bytes.json

The transformer of examples/bytes_lm.py (863,232 parameters) is trained for 300 steps as that script trains
it, and then goes on at a small constant rate under a new AdamW, as reinforcement learning does. The weights
are trained in float32 and published in bfloat16 after each of 200 steps; a receiver is given the bytes of the
updates alone and must hold the same bits in the end. Three seeds.

The others are what is written by hand today: indices and values (int32 + bf16), a bitmask and values, gaps
and the xor of the changed words through zstd, the xor of all words through zstd, and the whole checkpoint
through zstd. Sizes are means over the steps, and count for every format what the weights need: no names.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from benchmarks._common import Cells, shows_only
from benchmarks._places import example
from distcomp import updates
from distcomp.updates.blocks import leb128

RATES, SEEDS, TRAINED, STEPS, BATCH = (1e-6, 3e-6, 1e-5, 1e-4), 3, 300, 200, 8
OURS = ("distcomp, no entropy stage", "distcomp, zlib", "distcomp, zstd")


def words(state: dict[str, Tensor]) -> np.ndarray:
    """All words of a bfloat16 state in one array, in order of name."""
    return (
        torch.cat([state[name].reshape(-1) for name in sorted(state)])
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


def others(old: np.ndarray, new: np.ndarray) -> dict[str, int]:
    """Bytes of one step in the formats that are written by hand."""
    places = np.flatnonzero(old != new)
    zipped = zstandard.ZstdCompressor(level=3).compress
    gaps = b"".join(leb128(int(gap)) for gap in np.diff(places, prepend=-1) - 1)
    xor = old[places] ^ new[places]
    return {
        "int32 + bf16": 6 * len(places),
        "bitmask + bf16": -(-len(new) // 8) + 2 * len(places),
        "gaps + xor, zstd": len(zipped(gaps)) + len(zipped(xor.tobytes())),
        "xor of all, zstd": len(zipped((old ^ new).tobytes())),
        "checkpoint, zstd": len(zipped(new.tobytes())),
    }


class Training:
    """The language model and its texts."""

    def __init__(self, seed: int) -> None:
        lm = example("bytes_lm")
        self.loss_of, self.texts = lm.loss_of, lm.texts
        library = lm.modules()
        del library[::10]
        self.source = torch.cat(library)
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = lm.Reader()
        optimizer = torch.optim.AdamW(self.model.parameters(), 4e-3, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda at: lm.warm_up_then_cosine(at, TRAINED)
        )
        for _ in range(TRAINED):
            self.step(optimizer)
            schedule.step()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        text, following = self.texts(self.source, BATCH, self.draw)
        optimizer.zero_grad()
        self.loss_of(self.model(text), following).backward()
        optimizer.step()


def chained(seed: int, rate: float) -> dict[str, Any]:
    """The mean size of an update in each format, and whether the receiver ends at the same bits."""
    training = Training(seed)
    optimizer = torch.optim.AdamW(training.model.parameters(), rate)
    state = updates.floating_as(training.model, torch.bfloat16)
    publisher = updates.Publisher(state, key_every=0)
    received = {name: tensor.clone() for name, tensor in state.items()}
    receiver = updates.Receiver(received)
    sizes: dict[str, list[int]] = {}
    changed, encode_s, apply_s = [], [], []
    for _ in range(STEPS):
        old = words(state)
        training.step(optimizer)
        before, state = state, updates.floating_as(training.model, torch.bfloat16)
        new = words(state)
        changed.append(float((old != new).mean()))
        began_s = time.perf_counter()
        update = publisher.publish(state).difference
        assert update is not None
        encode_s.append(time.perf_counter() - began_s)
        data = update.to_bytes()
        began_s = time.perf_counter()
        receiver.receive(updates.read_update(data))
        apply_s.append(time.perf_counter() - began_s)
        ours = (updates.encode(before, state, entropy="none").nbytes, len(data),
                updates.encode(before, state, entropy="zstd").nbytes)  # fmt: skip
        for name, size in {**dict(zip(OURS, ours, strict=True)), **others(old, new)}.items():
            sizes.setdefault(name, []).append(size)
    receiver.check()
    model_bytes = 2 * len(new)
    return {
        "identical": bool(np.array_equal(words(received), words(state))), "versions": receiver.number,
        "changed": statistics.mean(changed), "model_bytes": model_bytes,
        "bytes": {name: statistics.mean(each) for name, each in sizes.items()},
        "smaller": {name: model_bytes / statistics.mean(each) for name, each in sizes.items()},
        "encode_ms": 1e3 * statistics.median(encode_s), "apply_ms": 1e3 * statistics.median(apply_s),
    }  # fmt: skip


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By rate: how many times smaller than the model each format is, mean and least over the seeds."""
    table: dict[str, dict[str, Any]] = {}
    for rate in RATES:
        runs = [cells[key] for key in (_name(rate, seed) for seed in range(SEEDS)) if key in cells]
        if runs:
            smaller = {name: [run["smaller"][name] for run in runs] for name in runs[0]["smaller"]}
            table[f"{rate:g}"] = {
                "seeds": len(runs), "changed": statistics.mean(run["changed"] for run in runs),
                "identical": all(run["identical"] for run in runs),
                "smaller": {name: {"mean": statistics.mean(each), "least"
                "": min(each)} for name, each in smaller.items()},
            }  # fmt: skip
    return table


def _name(rate: float, seed: int) -> str:
    return f"rate {rate:g} | seed {seed}"


def main() -> None:
    show_only = shows_only(__doc__)
    torch.set_num_threads(1)
    plan = {"task": "bytes of Python's standard library, transformer of 863,232 parameters",
            "trained": TRAINED,
            "steps": STEPS, "seeds": SEEDS, "rates": list(RATES)}  # fmt: skip
    cells = Cells("updates_bytes", plan)
    for seed in range(0 if show_only else SEEDS):
        for rate in RATES:
            cells.get(_name(rate, seed), lambda seed=seed, rate=rate: chained(seed, rate))
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for rate, row in cells.document["table"].items():
        print(f"rate {rate}: {row['changed']:.2%} changed, identical: {row['identical']}")
        for name, smaller in row["smaller"].items():
            print(f"    {name:<28}{smaller['mean']:8.1f} times smaller (least {smaller['least']:.1f})")


if __name__ == "__main__":
    main()
