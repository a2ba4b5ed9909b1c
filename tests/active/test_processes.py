"""Active parameters on real processes: who differs is named, and a copied method goes on alike."""

from __future__ import annotations

import pytest
import torch

from tests.active import rank_jobs as jobs


@pytest.mark.parametrize("averaged", [False, True])
def test_a_rank_whose_active_parameters_differ_is_named(cluster, averaged):
    for step, words in cluster(2).run(jobs.strayed, averaged):
        assert step == (4 if averaged else 3)  # an averaging exchanges at the next forward
        assert "the active parameters of rank 1 differ from those of rank 0 in step 3" in words


def test_a_copied_and_resumed_method_goes_on_bit_for_bit(cluster):
    (whole, alike), (resumed, again) = (cluster(2).run(jobs.resumed, at) for at in (-1, 5))
    assert torch.equal(whole, alike)
    assert torch.equal(whole, resumed)
    assert torch.equal(whole, again)
