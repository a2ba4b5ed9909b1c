"""Cheap bits inside, few bits across: a method for each of the two reductions of a hybrid mesh."""

from __future__ import annotations

import pytest
import torch

from . import inside_jobs as jobs


def test_identity_inside_and_across_has_the_bits_of_fsdps_own(cluster):
    plain = cluster(4).run(jobs.trained, "identity", None, None)
    ours = cluster(4).run(jobs.trained, "identity", "identity", None)
    for (expected, _, later), (found, stats, after) in zip(plain, ours, strict=True):
        assert torch.equal(expected, found)
        assert torch.equal(later, after)
        assert stats["shards"] == 2


def test_a_divide_factor_means_the_same_inside(cluster):
    for ours, plain in zip(
        *(cluster(4).run(jobs.divided, 2.0, inside) for inside in ("identity", None)), strict=True
    ):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("across", ["qsgd:bits=1", "powersgd:rank=2"])
@pytest.mark.parametrize("inside", ["qsgd:bits=8", "powersgd:rank=2"])
def test_all_replicas_of_all_shards_have_the_same_weights(cluster, across, inside):
    found = cluster(4).run(jobs.trained, across, inside, "qsgd:bits=8")
    exact = cluster(4).run(jobs.trained, "identity", None, None)[0][0]
    for weights, _, _ in found:
        assert torch.equal(weights, found[0][0])
        assert 0 < (weights - exact).abs().max() < 0.5


def test_each_reduction_sends_its_own_bits(cluster):
    def sent(across: str, inside: str | None, weights: str | None = None) -> dict[str, int]:
        answers = cluster(4).run(jobs.trained, across, inside, weights)
        assert all(one[1]["payload_by_kind"] == answers[0][1]["payload_by_kind"] for one in answers)
        return answers[0][1]["payload_by_kind"]

    exact = sent("identity", None)["values"]  # across alone: all of this rank's pieces, in float32
    both = sent("identity", "identity")["values"]
    assert both == 2 * exact  # of two shards a rank sends one piece inside, which is as long
    few = sent("qsgd:bits=1", "qsgd:bits=8")
    assert exact / 4 + exact / 32 < few["codes"] < 1.1 * (exact / 4 + exact / 32)
    assert "weights" not in few
    assert sent("qsgd:bits=1", "qsgd:bits=8", "qsgd:bits=8")["weights"] > exact / 4


def test_a_resumed_run_has_the_same_bits_and_both_residuals(cluster):
    for same, names in cluster(4).run(jobs.resumed):
        assert same
        assert {name.partition("/")[0] for name in names if "/" in name} >= {"inside", "weights"}
        assert any(not name.startswith(("inside/", "weights/")) for name in names)


def test_an_infinite_gradient_leaves_no_trace_in_either_replica(cluster):
    for kept in cluster(4).run(jobs.infinite):
        assert kept
        assert all(kept)


def test_what_cannot_be_is_refused_on_every_rank(cluster):
    words = (
        "averages models across replicas",
        "inside='diloco' is no method of gradients",
        "replicas=distcomp.Replicas(mesh['replicate'], inside='qsgd:bits=8')",
        "SettingsMismatch",
        "replicas= is a str",
    )
    for told in cluster(4).run(jobs.refusals):
        assert len(told) == len(words)
        for sentence, word in zip(told, words, strict=True):
            assert word in sentence
    assert len({told[3] for told in cluster(4).run(jobs.refusals)}) == 1
