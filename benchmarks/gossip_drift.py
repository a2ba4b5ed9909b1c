"""Ten thousand steps of every gossip method: does a replica ever part from its owner? Does the mean wander?

    python -m benchmarks.gossip_drift            # two minutes; writes results/gossip_drift.json

Four workers on a ring in lock-step, 600 parameters, noise for updates. Replicas are compared with what they
copy, byte by byte, every hundred steps. The sum of all models must change by the updates alone (DCD and ECD
do not promise that: they put the compressed difference into the model); what it has moved besides is given
in units of the models' own size.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks._common import arguments_of, write
from distcomp.averaging.base import Averaging
from distcomp.averaging.extrapolation import ECD
from distcomp.averaging.gossip import DCD, DPSGD, Choco, DeepSqueeze
from distcomp.averaging.workers import Workers
from distcomp.compressors import Quantize, ScaledSign

STEPS, WORKERS, NUMEL, EVERY = 10_000, 4, 600, 100
METHODS: dict[str, Averaging] = {
    "D-PSGD": DPSGD(),
    "DCD 8 bits": DCD(Quantize(8)),
    "ECD": ECD(),
    "CHOCO 2 bits": Choco(Quantize(2)),
    "CHOCO sign": Choco(ScaledSign()),
    "DeepSqueeze 4 bits": DeepSqueeze(Quantize(4)),
}
OWN = {DCD: "model", ECD: "estimate", Choco: "public"}
"""What a neighbour's replica is a copy of."""


def parted(workers: Workers) -> int:
    """How many replicas differ from what they copy."""
    states = [fragments[0].state for fragments in workers.fragments]
    own = OWN.get(type(workers.fragments[0][0].averaging))
    return sum(
        not torch.equal(replica.data.view(torch.int32), states[int(j)][own].data.view(torch.int32))
        for state in states
        for j, replica in (state["replicas"].items() if own else ())
    )


def run(averaging: Averaging) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    workers = Workers(averaging, 0.1 * torch.randn(NUMEL, generator=generator), WORKERS)
    expected = torch.stack(workers.models).double().sum(0)
    different, compared = 0, 0
    for step in range(1, STEPS + 1):
        updates = 0.001 * torch.randn(WORKERS, NUMEL, generator=generator)
        expected += updates.double().sum(0)
        for model, update in zip(workers.models, updates, strict=True):
            model += update
        workers.step()
        if step % EVERY == 0:
            different += parted(workers)
            compared += 1
    models = torch.stack(workers.models).double()
    return {
        "finite": bool(models.isfinite().all()),
        "comparisons": compared,
        "replicas_that_differed": different,
        "mean_moved_besides": float((models.sum(0) - expected).norm() / models.sum(0).norm()),
        "spread": workers.spread**0.5,
    }


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, averaging in METHODS.items():
        rows[name] = run(averaging)
        print(f"{name:<28}{rows[name]}", flush=True)
    write("gossip_drift", {"steps": STEPS, "workers": WORKERS, "parameters": NUMEL, "methods": rows})


if __name__ == "__main__":
    main()
