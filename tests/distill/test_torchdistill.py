"""torchdistill's losses and their gradients, a second oracle: pip install --no-deps torchdistill."""

from __future__ import annotations

import pytest
import torch

from distcomp import distill
from distcomp.distill import Lesson, NetworkOutput
from distcomp.randomness import Key

theirs = pytest.importorskip("torchdistill.losses.mid_level")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(objective, student, teacher, labels=None):
    return sum(objective.terms(Lesson(student, teacher, labels, 0, Key.of(0))).values())


def same(ours, other, leaf):
    """Both values, and both gradients of ``leaf``."""
    assert ours.item() == pytest.approx(other.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, other)]
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("T", "weight"), [(1.0, 0.3), (4.0, 0.5), (8.0, 0.9)])
def test_hintons_loss_is_kdloss(T, weight):
    zs, zt, y = drawn(6, 5).requires_grad_(), drawn(6, 5, seed=1), torch.tensor([0, 4, -1, 2, -1, 1])
    other = theirs.KDLoss(
        "fc", "output", "fc", "output", temperature=T, alpha=1 - weight, beta=weight, ignore_index=-1
    )
    said = other({"fc": {"output": zs}}, {"fc": {"output": zt}}, y)
    same(value(distill.hinton(T, weight), NetworkOutput(zs), NetworkOutput(zt), y), said, zs)


def test_attention_transfer_is_atloss():
    fs, ft = drawn(3, 4, 5, 2).requires_grad_(), drawn(3, 7, 5, 2, seed=1)
    side = {"io": "output", "path": "conv"}
    other = theirs.ATLoss({"pair": {"teacher": side, "student": side, "weight": 30}}, mode="code")
    said = other({"conv": {"output": fs}}, {"conv": {"output": ft}})
    ours = distill.attention({"conv": "conv"}, beta=30)
    same(value(ours, NetworkOutput(fs, {"conv": fs}), NetworkOutput(ft, {"conv": ft})), said, fs)


def test_factor_transfer_is_ftloss():
    torch.manual_seed(0)
    paraphraser = distill.Paraphraser(4, 2).double()
    fs, ft = drawn(3, 2, 5, 5).requires_grad_(), drawn(3, 4, 5, 5, seed=1)
    other = theirs.FTLoss(p=1, reduction="mean")
    factors = {"paraphraser": {"output": paraphraser.factor(ft)}}
    said = 50 * other({"translator": {"output": fs}}, factors)
    ours = distill.factor_transfer("s", "t", paraphraser, distill.Translator(3, 2), beta=50)
    same(value(ours, NetworkOutput(fs, {"s": fs}), NetworkOutput(ft, {"t": ft})), said, fs)
