"""Whole parameters on FSDP2: PowerSGD and partitions by name say what they say under DDP."""

from __future__ import annotations

import pytest
import torch

from distcomp.compressors import Identity, Quantize
from distcomp.methods import Partition, Rule, from_compressor
from tests.attaching.fsdp import matrix_jobs, shard_jobs

POWERSGD = "powersgd:rank=2,min_compression=1"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("spec", [POWERSGD, "powersgd:rank=1,min_compression=0,one_round=true"])
def test_powersgd_is_that_of_ddp(cluster, size, spec):
    """The same weights up to rounding, the same residuals by name, as many bytes beside the headers."""
    by_ddp = cluster(size).run(matrix_jobs.by_ddp, spec, 6)
    for expected, found in zip(by_ddp, cluster(size).run(matrix_jobs.by_fsdp, spec, 6), strict=True):
        assert torch.allclose(found[0], expected[0], rtol=1e-3, atol=1e-4)
        assert found[2].keys() == expected[2].keys()
        for name, leaves in expected[2].items():
            for path, value in leaves.items():
                if path.endswith("residual"):
                    assert torch.allclose(found[2][name][path], value, rtol=1e-3, atol=1e-4)
        assert found[1]["payload_bytes"] == pytest.approx(expected[1]["payload_bytes"], rel=0.03, abs=1500)
    exact = cluster(size).run(matrix_jobs.by_fsdp, "identity", 6)
    assert not torch.allclose(exact[0][0], by_ddp[0][0], rtol=1e-3, atol=1e-4)


def test_parameters_are_chosen_by_name(cluster):
    """The last layer, biases and norms in float32, the rest in one bit without a residual: after one step."""
    rule = Rule(("bias", "norm"), names=("5.*",))
    spec = Partition(rule, from_compressor(Identity()), from_compressor(Quantize(1)))
    exact, *_ = cluster(2).run(matrix_jobs.by_fsdp, "identity", 1)
    (found, stats, _), *_ = cluster(2).run(matrix_jobs.by_fsdp, spec, 1)
    at = 0
    for name, parameter in shard_jobs.network().named_parameters():
        mine, plain = (one[at : at + parameter.numel()] for one in (found, exact[0]))
        chosen = name.startswith("5.") or parameter.dim() == 1
        assert torch.allclose(mine, plain, rtol=1e-5, atol=1e-7) == chosen, name
        at += parameter.numel()
    assert stats["payload_bytes"] < 0.4 * exact[1]["payload_bytes"]


def test_what_is_owed_for_whole_parameters_is_handed_on_to_other_ranks(cluster):
    parts = cluster(4).run(matrix_jobs.saved, POWERSGD)
    states = [part[f"rank{rank}"]["state"] for rank, part in enumerate(parts)]
    for state in cluster(2).run(matrix_jobs.handed_on, POWERSGD, parts):
        for name, leaves in state.items():
            mean = torch.stack([one[name]["residual"] for one in states]).mean(0)
            torch.testing.assert_close(leaves["residual"], mean)


def test_what_is_not_trained_is_in_no_buffer(cluster):
    """At full rank PowerSGD is the mean."""
    for found, expected in cluster(2).run(matrix_jobs.frozen):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_across_replicas_each_shard_is_a_matrix(cluster):
    found = cluster(4).run(shard_jobs.trained, POWERSGD, 4, 2)
    exact = cluster(4).run(shard_jobs.trained, "identity", 4, 2)
    for weights, stats in found:
        assert torch.equal(weights, found[0][0])
        assert not torch.allclose(weights, exact[0][0], rtol=1e-3, atol=1e-4)
        assert stats["payload_bytes"] < 0.6 * exact[0][1]["payload_bytes"]
