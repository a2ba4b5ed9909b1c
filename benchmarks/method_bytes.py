"""How many bytes does each method send? Of every registered method, at its plainest settings.

    python -m benchmarks.method_bytes              # writes results/method_bytes.json; seconds

Four ranks in lock-step, 50 steps, the parameters and settings of ``benchmarks/method_digests.py``: what the
ledger counted, per rank and step, by kind. Predictions, which do not depend on the parameters, are those of
100 shared examples and 10 classes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from benchmarks._common import arguments_of, write
from benchmarks.method_digests import ROWS, SEED, STEPS, Inputs, registered, world_of
from distcomp.averaging.workers import Workers
from distcomp.layout import Layout
from distcomp.methods import METHODS, parse

RANKS = 4
EXAMPLES = Layout.of([("predictions", (100, 10))])


def plainest() -> dict[str, str]:
    """Of each method the shortest text."""
    texts = sorted(ROWS.values(), key=len)
    return {
        name: next((text for text in texts if text.partition(":")[0] == name), name) for name in registered()
    }


def sent(text: str, inputs: Inputs) -> dict[str, Any]:
    """Bytes of the mean rank in the mean step, by kind and in all."""
    world = world_of(text, RANKS)
    for step in range(STEPS):
        world.step([inputs.of(rank, step) for rank in range(RANKS)])
    kinds: Counter[str] = Counter()
    for ledger in world.sent_bytes():
        kinds.update(ledger)
    by_kind = {kind: nbytes / RANKS / STEPS for kind, nbytes in sorted(kinds.items())}
    return {"text": text, "bytes": sum(by_kind.values()), "by_kind": by_kind}


def sent_predictions(text: str) -> dict[str, Any]:
    """As :func:`sent`, of what workers predict of :data:`EXAMPLES`."""
    draw = torch.Generator().manual_seed(SEED)
    workers = Workers(parse(text), torch.randn(EXAMPLES.numel, generator=draw), RANKS, EXAMPLES)
    for _ in range(STEPS):
        workers.step()
    kinds: Counter[str] = Counter()
    for ledger in workers.net.ledgers:
        kinds.update(ledger.sent_bytes)
    by_kind = {kind: nbytes / RANKS / STEPS for kind, nbytes in sorted(kinds.items())}
    return {"text": text, "bytes": sum(by_kind.values()), "by_kind": by_kind}


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    inputs = Inputs()
    rows = {name: sent(text, inputs) for name, text in plainest().items()}
    told = sorted(name for name, entry in METHODS.items() if entry.kind == "predictions")
    rows = dict(sorted({**rows, **{name: sent_predictions(name) for name in told}}.items()))
    for name, row in rows.items():
        print(f"{name:<20}{row['bytes']:>12,.1f} B  {row['text']}")
    write("method_bytes", {"ranks": RANKS, "steps": STEPS, "methods": rows}, SEED)


if __name__ == "__main__":
    main()
