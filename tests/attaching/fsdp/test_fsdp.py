"""FSDP2 on real processes: FSDP's bits where nothing is compressed, an oracle's numbers where it is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distcomp import registry
from distcomp.methods import compact_residuals, parse
from tests.attaching.fsdp import oracle, shard_jobs

GRADIENT = [
    name for name, entry in registry.METHODS.items() if entry.kind == "gradient" and not entry.control
]
SPECS = [*GRADIENT, "qsgd:bits=1", "warmup:inner=qsgd,steps=3", "qsgd:bits=8 -> 4 @ 3"]


def test_identity_has_the_bits_of_fsdp_and_leaves_none_behind(cluster):
    plain = cluster(2).run(shard_jobs.stock, 9)
    for expected, found in zip(plain, cluster(2).run(shard_jobs.left, 3), strict=True):
        assert torch.equal(expected, found)


def test_identity_is_the_mean_at_four_ranks(cluster):
    plain = cluster(4).run(shard_jobs.stock, 5)
    for expected, (found, stats) in zip(
        plain, cluster(4).run(shard_jobs.trained, "identity", 5), strict=True
    ):
        assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6)
        assert stats["iterations"] == 5


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(("spec", "code"), [("identity", oracle.exact), ("qsgd:bits=1", oracle.one_bit)])
def test_training_is_the_oracles(cluster, size, replicas, spec, code):
    found = cluster(size).run(shard_jobs.trained, spec, 6, replicas)
    seed = 0 if replicas == 1 else 50  # replicas take the first one's weights
    expected = oracle.train(lambda: shard_jobs.network(seed), 6, size // replicas, replicas, code)
    for weights, _ in found:
        assert torch.equal(weights, found[0][0])
        assert np.allclose(weights.numpy(), expected, rtol=1e-4, atol=1e-5)


def padded_numel(shards: int) -> int:
    model = shard_jobs.network()
    return sum(math.ceil(p.shape[0] / shards) * shards * p[0].numel() for p in model.parameters())


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_what_is_owed_and_what_is_sent(cluster, size, replicas):
    """One residual as long as the whole padded model per rank, or across replicas as long as the shard."""
    shards = size // replicas
    for _, stats in cluster(size).run(shard_jobs.trained, "qsgd:bits=1", 2, replicas):
        residual = padded_numel(shards) // (shards if replicas > 1 else 1)
        assert stats["state_bytes"] == 4 * residual
        assert stats["shards"] == shards
        talkers, told = (replicas, 2) if replicas > 1 else (shards, 1)
        least = told * (talkers - 1) / talkers * residual / 8
        assert least < stats["last"]["payload_bytes"] < 3 * least + 600  # scales and headers of four buffers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_on_the_way(cluster, dtype):
    for plain, found in cluster(2).run(shard_jobs.policy, "identity", dtype):
        assert torch.allclose(plain, found, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_resume_is_bit_equal(cluster, spec):
    saved = cluster(2).run(shard_jobs.first_half, spec)
    assert all(torch.isfinite(one["whole"]).all() for one in saved)
    assert all(cluster(2).run(shard_jobs.second_half, spec, saved))


@pytest.mark.parametrize(
    ("form", "beta", "per_value"),
    [("bf16", 1.0, 2.0), ("int8", 1.0, 1.0 + 4 / 512), ("int8", 0.5, 1.0 + 4 / 512)],
)
def test_residuals_of_fewer_bits_are_resumed_bit_by_bit(cluster, form, beta, per_value):
    """With a beta they are LoCo's moving average. What is kept is the formula of docs/fsdp.md."""
    spec = replace(compact_residuals(parse("qsgd:bits=1"), form), beta=beta)
    saved = cluster(2).run(shard_jobs.first_half, spec)
    assert all(cluster(2).run(shard_jobs.second_half, spec, saved))
    for _, stats in cluster(2).run(shard_jobs.trained, spec, 2):
        scales = 4 * 2 * 4 if form == "int8" else 0  # each buffer's two pieces begin a block
        assert stats["state_bytes"] == pytest.approx(per_value * padded_numel(2), abs=4 * 40 + scales)


def test_resume_is_bit_equal_across_replicas(cluster):
    saved = cluster(4).run(shard_jobs.first_half, "qsgd:bits=1", 2)
    assert all(cluster(4).run(shard_jobs.second_half, "qsgd:bits=1", saved, 2))


def test_what_is_owed_is_refused_on_another_number_of_ranks(cluster):
    saved = cluster(4).run(shard_jobs.first_half, "qsgd:bits=1")
    for refusal in cluster(2).run(shard_jobs.loaded, saved):
        assert "4 ranks and 4 shards, and here are 2 and 2" in refusal
        assert "interleaved" in refusal


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 2)])
def test_a_step_that_is_not_finite_leaves_no_trace(cluster, size, replicas):
    found = cluster(size).run(shard_jobs.poisoned, replicas, 1)
    assert all(same for same, _, _ in found)
    assert any(seen for _, seen, _ in found)
    assert all(iterations == 3 for _, _, iterations in found)


def test_gradients_accumulate_without_an_exchange(cluster):
    for plain, found, iterations in cluster(2).run(shard_jobs.accumulated):
        assert torch.equal(plain, found)
        assert iterations == 3


def test_residuals_are_in_unscaled_units(cluster):
    for plain, found in cluster(2).run(shard_jobs.scaled):
        assert torch.allclose(plain, found, rtol=1e-4, atol=1e-5)


def test_a_divide_factor_counts_all_ranks_also_across_replicas(cluster):
    """Divided by the number of ranks, a sum is the mean: inside the shards and across the replicas."""
    mean = cluster(4).run(shard_jobs.trained, "identity", 3, 2)
    for expected, found in zip(mean, cluster(4).run(shard_jobs.divided, 4.0, 3, 2), strict=True):
        assert torch.allclose(expected[0], found[0], rtol=1e-6, atol=1e-7)
        assert torch.allclose(expected[0], found[1], rtol=1e-5, atol=1e-6)  # detached


SENTENCES = {
    ("columns", "powersgd"): "cut along another dimension",
    ("", "diloco"): "which ranks hold the same shard",
    ("", "ddp"): "DistributedDataParallel's buckets",
    ("hybrid", "identity"): "mesh of 2 dimensions",
    ("replicas without shards", "identity"): "Sequential is none",
    ("replicated", "identity"): "wrapped by replicate()",
    ("tensor parallel", "identity"): "0.weight is cut along several dimensions of a mesh (dp, tp)",
    ("unused", "identity"): "set_reduce_scatter_unused_params",
}


@pytest.mark.parametrize(("kind", "spec"), SENTENCES)
def test_what_cannot_be_served_is_refused_with_its_reason(cluster, kind, spec):
    for refusal in cluster(2).run(shard_jobs.sentence, kind, spec):
        assert SENTENCES[kind, spec] in refusal
