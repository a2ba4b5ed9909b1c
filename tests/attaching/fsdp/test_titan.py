"""FSDP2 as torchtitan sets it up: plain FSDP2's bits where nothing is compressed; where it is, it trains."""

from __future__ import annotations

import pytest
import torch

from . import titan_jobs

SETUPS: dict[str, dict] = {
    "as it comes": {},
    "another factor": {"factor": 3.0},
    "tied embedding": {"tied": True},
    "bf16": {"param_dtype": torch.bfloat16},
    "bf16 both ways": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16},
    "activation checkpoints": {"checkpointed": True},
    "accumulated": {"micro": 3},
    "kept after forward": {"reshard": False},
    "kept while gradients accumulate": {"micro": 3, "kept": True},
    "prefetched": {"prefetch": True},
    "a parameter without a gradient": {"unused": True},
    "compiled blocks": {"compiled": True},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_identity_has_the_bits_of_plain_fsdp2(cluster, setup):
    options = SETUPS[setup]
    plain = cluster(2).run(titan_jobs.titan, None, options, 4, {})
    for expected, answer in zip(
        plain, cluster(2).run(titan_jobs.titan, "identity", options, 4, {}), strict=True
    ):
        assert torch.equal(expected[0], answer[0])
        assert expected[1] == answer[1]
        assert answer[2]["iterations"] == 4
        assert not answer[2]["unused gradient"]


def test_a_factor_within_the_operation_is_one_outside_of_it(cluster):
    """Without ``set_force_sum_reduction_for_comms`` the factor comes inside of what FSDP asks for."""
    outside = cluster(2).run(titan_jobs.titan, "identity", {"factor": 4.0}, 3, {})
    inside = cluster(2).run(titan_jobs.titan, "identity", {"factor": 4.0, "sums": False}, 3, {})
    for expected, answer in zip(outside, inside, strict=True):
        assert torch.equal(expected[0], answer[0])


@pytest.mark.parametrize("size", [2, 4])
def test_it_trains_with_few_bits(cluster, size):
    plain = cluster(size).run(titan_jobs.titan, None, {}, 25, {})
    for expected, answer in zip(
        plain, cluster(size).run(titan_jobs.titan, "qsgd:bits=4", {}, 25, {}), strict=True
    ):
        assert expected[1][-1] < 0.8 * expected[1][0]
        assert answer[1][-1] < 1.1 * expected[1][-1]
