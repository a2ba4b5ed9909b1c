"""Distillation beside other features: what it reads must not change anything, nor be changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcomp import distill
from distcomp.averaging.codistill import Codistillation
from distcomp.distill.hints import features_of
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from tests.distill import edge_jobs
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


def test_an_output_that_is_changed_in_place_is_no_tap():
    student = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 4))
    teacher = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4)
    )
    x, y = torch.randn(2, 1, 4, 4), torch.arange(2)
    loss = distill.hard_labels() + distill.attention({"0": "0"})
    teach = distill.Distill(student, teacher, loss)
    with pytest.raises(DistcompError, match="what the module '0' gave was changed in place"):
        teach(x, y)
    teach.remove()
    with pytest.raises(DistcompError, match="changed in place"):
        features_of(teacher, "0", x)
    assert torch.equal(features_of(teacher, "1", x), torch.relu(teacher[0](x)))
    with torch.inference_mode():  # whose tensors do not count their changes
        assert torch.equal(features_of(student, "0", x), student[0](x))


def test_kdgan_asks_for_the_iteration_and_draws_by_rank(monkeypatch):
    torch.manual_seed(0)
    game = distill.KDGAN(nn.Linear(6, 4), nn.Linear(6, 4), distill.LabelDiscriminator(6, 4))
    x, y = rows(4)
    with pytest.raises(TypeError, match="step"):
        game(x, y)
    assert not torch.equal(game(x, y, 0), game(x, y, 1))
    assert torch.equal(game(x, y, 1), game(x, y, 1, rank=0))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert torch.equal(game(x, y, 1), game(x, y, 1, rank=3))
    assert not torch.equal(game(x, y, 1), game(x, y, 1, rank=0))


def test_shared_rows_are_not_in_the_running_statistics(cluster):
    for mean, batches in cluster(2).run(edge_jobs.normalised):
        assert mean < 1
        assert batches == 3


def test_checkpoints_of_running_statistics_are_refused(cluster):
    for words in cluster(2).run(edge_jobs.checkpoints_refuse):
        assert "and 1 evaluates by running statistics" in words


def test_checkpoints_of_a_bfloat16_model_are_distilled_from(cluster):
    for trained, said in cluster(2).run(edge_jobs.in_bfloat16):
        assert trained
        assert 0 < said < 10
