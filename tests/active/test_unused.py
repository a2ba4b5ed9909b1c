"""Parameters that no rank used in a step are not sent, and nothing that is owed to them is lost."""

from __future__ import annotations

import pytest
import torch

from tests.active import rank_jobs as jobs

WITH_RESIDUALS = ["qsgd:bits=1", "topk:ratio=0.1", "powersgd:rank=1", "onebit", "ef_signsgd"]


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("spec", WITH_RESIDUALS)
def test_what_was_applied_and_what_is_owed_is_what_came_in(cluster, spec, micro_steps):
    ranks = cluster(2).run(jobs.account, spec, micro_steps)
    accounts = [account for account, _ in ranks]
    for name, (_, applied, _) in accounts[0].items():
        came = sum(account[name][0] for account in accounts) / 2
        residual = sum(account[name][2] for account in accounts) / 2
        assert came.norm() > 0
        torch.testing.assert_close(
            applied + residual, came, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert [touched for _, touched in ranks] == [[], []]


def test_replicas_stay_equal_though_layers_come_and_go(cluster):
    assert cluster(2).run(jobs.replicas) == [True, True]


def test_what_nobody_used_is_not_sent_and_asking_has_its_price(cluster):
    whole, layer, asked = 4 * (12 * 24 + 24 + 2 * (24 * 24 + 24) + 24 * 5 + 5), 4 * (24 * 24 + 24), 40
    for sent in cluster(2).run(jobs.priced):
        totals = [sum(step.values()) for step in sent]
        unused = [0, 1, 2, 2, 0, 0]  # layers, by step; in the last each rank uses another
        assert totals == [whole - count * layer + asked for count in unused]
        assert [step["active"] for step in sent] == [1] * 6
        assert [step["header"] for step in sent] == [39] * 6


def test_stale_gradients_of_what_nobody_used_are_neither_sent_nor_changed(cluster):
    assert cluster(2).run(jobs.left_alone) == [(True, True)] * 2


def test_what_nobody_used_is_not_decayed(cluster):
    assert cluster(2).run(jobs.decayed) == [(False, True)] * 2
