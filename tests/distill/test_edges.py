"""Distillation beside other features: what it reads must not change anything, nor be changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcomp import distill
from distcomp.averaging.codistill import Codistillation
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from tests.distill.networks import mlp, rows

LAYOUT = Layout.of([("predictions", (6, 5))])


def test_freezing_for_stage_one_leaves_the_regressor():
    student, teacher = mlp(8), mlp(16, seed=1)
    x, _ = rows(4)
    loss = distill.fitnet_hint("1", "3", distill.regressor(student, "1", teacher, "3", x))
    distill.install_heads(student, loss.heads())
    thaw = distill.freeze_above(student, "1", x)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained == ["0.weight", "0.bias", "distill_heads.1.weight", "distill_heads.1.bias"]
    thaw()
    assert all(p.requires_grad for p in student.parameters())


def test_a_regressor_has_the_students_type():
    x = rows(4)[0].double()
    assert distill.regressor(mlp(8).double(), "1", mlp(16).double(), "1", x).weight.dtype == torch.float64
    image = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3)).double()
    assert distill.regressor(convolution, "0", convolution, "0", image).weight.dtype == torch.float64


def test_a_summary_changes_nothing():
    student = nn.Sequential(mlp(8), nn.Dropout(0.5), nn.BatchNorm1d(4))
    teach = distill.Distill(student, mlp(seed=1), distill.hinton())
    coins = torch.get_rng_state()
    teach.summary(rows(4)[0])
    assert torch.equal(torch.get_rng_state(), coins)
    assert int(student[2].num_batches_tracked) == 0
    assert student.training


def test_copies_of_checkpoints_need_a_topology_that_stays():
    with pytest.raises(DistcompError, match="one_peer_exponential change"):
        Codistillation(topology="one_peer_exponential", exchanged="checkpoints").conditions(LAYOUT, 4)
    assert Codistillation(topology="one_peer_exponential").conditions(LAYOUT, 4)["degree"] == 1
    assert Codistillation(topology="ring", exchanged="checkpoints").conditions(LAYOUT, 4)["degree"] == 2


def test_a_rank_that_began_with_anothers_logits_has_them_after_a_crash(tmp_path):
    x, _ = rows(2)
    distill.LogitCache(tmp_path, "t", rank=0).put([0], x[:1])
    distill.LogitCache(tmp_path, "t", rank=1).put([1], x[1:])
    resumed = distill.LogitCache(tmp_path, "t", rank=1)
    assert len(resumed) == 2
    assert torch.equal(resumed.get([0, 1]), x)


def test_a_cache_without_a_network_reads_what_all_ranks_wrote(tmp_path):
    x, _ = rows(2)
    for rank in (0, 1):  # neither begins with the other's
        (tmp_path / str(rank)).mkdir()
        distill.LogitCache(tmp_path / str(rank), "t", rank=rank).put([rank], x[rank : rank + 1])
        (tmp_path / str(rank) / f"rank{rank}.logits").rename(tmp_path / f"rank{rank}.logits")
    teacher = distill.CachedTeacher(None, tmp_path, teacher="t")
    assert torch.equal(teacher.predict(x, [0, 1]).logits, x)


def test_a_teachers_name_that_does_not_fit_is_refused(tmp_path):
    cache = distill.LogitCache(tmp_path, "t" * 300, rank=0)
    with pytest.raises(DistcompError, match="give a shorter one"):
        cache.put([0], rows(1)[0])
    assert not list(tmp_path.glob("*.logits")) or all(not p.stat().st_size for p in tmp_path.glob("*.logits"))
