"""On two real processes: replicas stay identical, and what cannot be is refused by name."""

from __future__ import annotations

import pytest
import torch

from tests.parametrize import jobs
from tests.parametrize.pairs import PAIRS, built


def alone(names: tuple[str, ...], size: int) -> list[float]:
    """One process that takes the batches of all ranks."""
    model = built(names, 0)
    jobs.trained(model, torch.optim.SGD(model.parameters(), 0.1), 0, size)
    return jobs.flat(model)


@pytest.mark.parametrize("method", [None, "qsgd:bits=4"])
def test_replicas_of_every_pair_stay_identical(cluster, method) -> None:
    first, second = cluster(2).run(jobs.replicas, method)
    assert first == second
    for names, (stored, _) in zip(PAIRS, first, strict=True):
        assert stored != jobs.flat(built(names, 0))
        if method is None:
            assert stored == pytest.approx(alone(names, 2), rel=1e-4, abs=1e-6)


def test_a_quantized_structure_is_sharded_as_other_weights_are(cluster) -> None:
    for weights in cluster(2).run(jobs.sharded):
        assert weights == pytest.approx(alone(("structure", "quantizer"), 2), rel=1e-4, abs=1e-6)


def test_what_comes_too_late_is_refused_and_what_may_come_late_is_exchanged(cluster) -> None:
    for after_ddp, after_fsdp, alike in cluster(2).run(jobs.refused):
        assert "LowRank (structured) gives 0.weight new parameters" in after_ddp
        assert "0.weight is sharded by FSDP already" in after_fsdp
        assert alike
