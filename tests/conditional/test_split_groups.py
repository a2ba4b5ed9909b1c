"""SplitNet's groups, each on a rank of its own, against the cut network in one process."""

from __future__ import annotations

import pytest
import torch

from distcomp import DistcompError
from distcomp.conditional import merge_groups
from tests.cluster import Cluster
from tests.conditional import group_jobs as jobs

HEADERS = 400
"""Payload headers of a step's buffers, at most."""


def close(one, other) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("size", "clip", "bias"), [(2, False, True), (4, True, True), (2, True, False)])
def test_it_is_the_cut_network_of_one_process(cluster, size, clip, bias) -> None:
    parts = cluster(size).run(jobs.spread_over, "identity", clip, bias)
    losses, state, scores = jobs.alone(clip, bias)
    close(merge_groups([part["state"] for part in parts]), state)
    for part in parts:
        assert part["losses"] == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(part["scores"], scores, atol=1e-5, rtol=1e-5)
    again = jobs.merged_into_one_process([part["state"] for part in parts], bias).eval()
    torch.testing.assert_close(again(jobs.batch(99)[0]), parts[0]["scores"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["identity", "qsgd:bits=4", "powersgd"])
def test_nothing_is_exchanged_for_the_groups(cluster, method) -> None:
    first, second = cluster(2).run(jobs.spread_over, method)
    net = jobs.network()
    shared = [part.numel() for layer in (net[0], net[1]) for part in layer.parameters()]
    cut = [sum(part.numel() for part in net[int(layer)].parameters()) for layer in jobs.CUT]
    assert (first["own"], second["own"]) == ([0, 1], [2, 3])
    assert first["held"] + second["held"] == sum(cut)  # each is on one rank, and on no other
    if method == "identity":  # at two ranks each sends as much as a gradient has
        assert 4 * sum(shared) <= first["sent_bytes"] <= 4 * sum(shared) + HEADERS
    else:
        assert first["sent_bytes"] < 4 * sum(shared) + HEADERS
    assert 4 * min(first["held"], second["held"]) > HEADERS  # they would be seen
    for name, value in first["state"].items():
        if name.startswith(("0.", "1.")):
            assert torch.equal(value, second["state"][name]), f"replicas of {name} part"
    outputs = max((jobs.GROUP_OF["classes"] // 2 == rank).sum().item() for rank in range(2))
    assert first["called_bytes"]["values"] == jobs.STEPS * 4 * jobs.BATCH * (outputs + 1)


@pytest.mark.parametrize("method", ["qsgd:bits=1", "powersgd", "pqasgd:period=2"])
def test_a_resumed_run_is_the_same_bit_for_bit(cluster, method) -> None:
    whole = cluster(2).run(jobs.resumed, method, 0)
    again = cluster(2).run(jobs.resumed, method, 2)
    for one, other in zip(whole, again, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_parts_take_theirs_of_a_whole_checkpoint(cluster) -> None:
    _, state, scores = jobs.alone()
    for size in (2, 4):
        for found in cluster(size).run(jobs.from_whole, state):
            torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-5)


def test_another_batch_on_a_rank_is_refused(cluster) -> None:
    for words in cluster(2).run(jobs.other_batches):
        assert "was given another batch" in words


def test_what_cannot_be_spread_is_refused_in_a_sentence(cluster) -> None:
    for words in cluster(2).run(jobs.refusals):
        assert "cut it first" in words["uncut"]
        assert "3 groups do not divide among 2 ranks" in words["three groups"]
        assert "6 (BatchNorm1d) stands between cut layers" in words["norm between"]
        assert "6 (Linear) stands between cut layers" in words["dense between"]
        assert "hand over the plain model" in words["wrapped"]
        assert "spread over ranks already" in words["twice"]
        assert "the checkpoint lacks 2.parametrizations.weight.original" in words["lacking"]


def test_parts_that_lack_a_group_are_not_merged() -> None:
    state = jobs.network().state_dict()
    part = {name: value for name, value in state.items() if not name.endswith("weight.original2")}
    with pytest.raises(DistcompError, match="no part has group 2 of 2"):
        merge_groups([part])


def test_a_dead_rank_is_named() -> None:
    ranks = Cluster(2)
    try:
        answers = ranks.results(jobs.killed)
        assert "rank 1" in answers[0], answers[0]
    finally:
        ranks.close()
