"""Pruning on real processes: the same masks everywhere, the same training as on one, fewer bytes."""

from __future__ import annotations

import pytest
import torch

from tests.pruning import rank_jobs as jobs


@pytest.mark.parametrize("maker", ["dns", "rigl"])
def test_masks_are_identical_over_a_thousand_steps_with_random_delays(cluster, maker):
    (digests, equal, density), *others = cluster(2).run(jobs.long_run, maker, 1000 if maker == "dns" else 120)
    assert equal
    assert 0.05 < density < 0.95
    assert len(set(digests)) > 20
    assert [other[0] for other in others] == [digests]


@pytest.mark.parametrize("maker", ["gradual", "rigl"])
def test_the_loss_is_that_of_pruning_on_one_process(cluster, maker):
    expected = jobs.alone(maker, 2)
    for (found, _, sparsity), alone in zip(
        cluster(2).run(jobs.losses, maker, "identity"), expected, strict=True
    ):
        assert found == pytest.approx(alone, rel=1e-4)
        assert sparsity["0.weight"] == pytest.approx(0.8 if maker == "gradual" else 0.7, abs=0.01)


def test_dead_weights_cost_no_bytes(cluster):
    for _, sent, sparsity in cluster(2).run(jobs.losses, "once", "identity"):
        dense, active = 4 * (16 * 40 + 40 * 5 + 45), 4 * (64 + 20 + 45)
        assert sparsity == {"0.weight": pytest.approx(0.9), "2.weight": pytest.approx(0.9)}
        assert sent[0] == dense
        assert set(sent[4:]) == {active}


def test_dense_steps_are_counted(cluster):
    for _, sent, _ in cluster(2).run(jobs.losses, "rigl", "identity"):
        dense = 4 * (16 * 40 + 40 * 5 + 45)
        assert sent[5] == sent[10] == dense
        assert max(sent[1:5] + sent[7:10] + sent[12:15]) < 0.45 * dense


def test_ranks_whose_masks_differ_find_out(cluster):
    assert all("masks of rank 1 differ" in told for told in cluster(2).run(jobs.strayed))


@pytest.mark.parametrize(("maker", "method"), [("dns", "qsgd:bits=1"), ("gradual", "powersgd:rank=1")])
def test_resume_is_bit_equal(cluster, maker, method):
    whole = cluster(2).run(jobs.whole, maker, method)
    saved = cluster(2).run(jobs.first_half, maker, method)
    resumed = cluster(2).run(jobs.second_half, maker, method, saved)
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("averaging", jobs.AVERAGINGS)
@pytest.mark.parametrize("maker", ["gradual", "dns"])
def test_averaged_models_share_masks_though_their_weights_differ(cluster, averaging, maker):
    (digests, exact, density, spread, _), *others = cluster(3).run(jobs.averaged, averaging, maker)
    assert exact
    assert density < 0.9
    assert spread > 0 or averaging == "local_sgd"
    assert len(set(digests)) > 2
    assert all(other[0] == digests for other in others)
