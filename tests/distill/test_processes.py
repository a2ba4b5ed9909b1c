"""Distillation on two ranks: the teacher is in nothing that is sent, averaged or saved."""

from __future__ import annotations

import pytest
import torch

from tests.distill import rank_jobs as jobs

BOTH = pytest.mark.parametrize("how", ["ddp", "fsdp"])


@BOTH
def test_the_teacher_is_sent_averaged_and_saved_nowhere(cluster, how, tmp_path):
    first, second = cluster(2).run(jobs.trained, how, str(tmp_path))
    assert torch.equal(first["weights"], second["weights"])
    assert torch.isfinite(first["weights"]).all()
    assert first["weights"].numel() == first["parameters"]
    # 4 bits a value and scales; the teacher has forty times as many values as that
    assert first["sent_bytes"] < 4 * first["parameters"]
    assert {name.removeprefix("module.") for name in first["model_names"]} == set(jobs.mlp(8).state_dict())
    assert {name for name in first["names"] if not name.startswith("exchange/")} <= set(
        jobs.mlp(8).state_dict()
    )
    whole = first["parameters"]
    assert first["optimized"] == whole
    assert first["iterations"] == 6
    assert first["last"] != second["last"]  # each learnt from its own examples, and from noise of its own


def test_the_teacher_is_in_no_average_of_models(cluster):
    first, second = cluster(2).run(jobs.averaged)
    assert torch.equal(first["weights"], second["weights"])
    taught = sum(p.numel() for p in jobs.mlp(64).parameters())
    assert 0 < first["sent_bytes"] < 4 * taught  # one average of the teacher would be as much
    assert not any("teacher" in name for name in first["names"])


@BOTH
def test_resume_is_bit_equal_with_cached_logits(cluster, how, tmp_path):
    for whole, resumed in cluster(2).run(jobs.resumed, how, str(tmp_path)):
        assert torch.equal(whole, resumed)


@BOTH
def test_heads_are_trained_alike_and_taken_off(cluster, how):
    (first, translator, last, names), (second, other, _, _) = cluster(2).run(jobs.with_heads, how)
    assert torch.equal(first, second)
    assert torch.equal(translator, other)
    assert set(last) == {"labels", "attention", "factor"}
    assert names == sorted(jobs.cnn(4).state_dict())


@BOTH
def test_the_first_stage_of_a_hint_sends_the_lower_half_alone(cluster, how):
    found = cluster(2).run(jobs.first_stage, how)
    for sent, below, iterations, _, thawed in found:
        if how == "ddp":
            assert sent == pytest.approx(4 * below, rel=0.15)
        assert iterations == 4
        assert thawed == 6
    assert torch.equal(found[0][3], found[1][3])


@BOTH
def test_statistics_say_by_how_much_dropped_branches_raise_the_wire(cluster, how):
    for ensemble, alone in cluster(2).run(jobs.dropped, how):
        assert "training_factor" not in alone
        raised = ensemble["payload_bytes"] / alone["payload_bytes"]
        assert raised == pytest.approx(ensemble["training_factor"], rel=0.02)
        assert raised > 2


def test_heads_that_nobody_would_reduce_are_refused(cluster):
    assert all("wrapped already" in told for told in cluster(2).run(jobs.late_heads))
