"""Gradients of the losses in which somebody's predictions are held fixed: central differences of the papers'
equations in NumPy, with what is detached kept as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcomp import distill
from distcomp.averaging import codistill
from distcomp.distill.kdgan import relaxed
from distcomp.distill.online import Branches
from distcomp.randomness import Key
from tests.distill import oracles

LABELS = torch.tensor([0, 3, -1, 2, 1])
Y = LABELS.numpy()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(f, x, h=1e-6):
    """The gradient of a number by central differences."""
    found = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = h
        found[at] = (f(x + step) - f(x - step)) / (2 * h)
    return found


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0].numpy()


def test_a_mutual_learner_is_pulled_by_the_others_as_they_were():
    logits = [drawn(5, 4, seed=i).requires_grad_() for i in range(3)]
    found = gradient(distill.mutual_loss(logits, LABELS, 0.7), logits[0])
    others = [oracles.softmax(z.detach().numpy()) for z in logits[1:]]

    def own(z):
        return oracles.cross_entropy(z, Y) + 0.7 * np.mean(
            [oracles.kl(p, oracles.softmax(z)) for p in others]
        )

    assert np.allclose(found, differences(own, logits[0].detach().numpy()), atol=1e-7)


def test_a_branch_is_pulled_by_its_own_labels_the_ensembles_and_the_ensemble_as_it_was():
    each = [drawn(5, 4, seed=i).requires_grad_() for i in range(2)]
    gate, T, weight = drawn(5, 2, seed=5).softmax(1), 3.0, 0.6
    ensemble = gate[:, :1] * each[0] + gate[:, 1:] * each[1]
    loss = distill.ensemble_loss(Branches(tuple(each), ensemble, gate), LABELS, T, weight)
    fixed, other, shares = (t.detach().numpy() for t in (ensemble, each[1], gate))

    def own(z):
        mixed = shares[:, :1] * z + shares[:, 1:] * other
        taught = T * T * oracles.kl(oracles.softmax(fixed, T), oracles.softmax(z, T))
        return oracles.cross_entropy(z, Y) + oracles.cross_entropy(mixed, Y) + weight * taught

    assert np.allclose(gradient(loss, each[0]), differences(own, each[0].detach().numpy()), atol=1e-7)


def test_a_classifier_of_the_game_is_pulled_through_its_sample_and_the_judge():
    torch.manual_seed(0)
    judge = distill.LabelDiscriminator(6, 4, 5)
    parts = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4), judge
    game = distill.KDGAN(*parts, 0.4, 0.6, 0.2, temperature=0.8).double()
    x = drawn(5, 6)
    found = gradient(game.terms(x, LABELS, step=2, rank=0).classifier, game.classifier.bias)
    bias, zc, zt = (t.detach() for t in (game.classifier.bias, game.classifier(x), game.teacher(x)))
    key = Key.of(0, 2).fold("kdgan", 0).fold("classifier")

    def own(b):
        moved = zc + torch.from_numpy(b) - bias
        with torch.no_grad():
            fooled = np.log1p(np.exp(-judge(x, relaxed(moved, 0.8, key)).numpy())).mean()
        z = moved.numpy()
        pulled = oracles.kl(oracles.softmax(zt.numpy()), oracles.softmax(z))
        return oracles.cross_entropy(z, Y) + 0.4 * fooled + 0.6 * pulled

    assert np.allclose(found, differences(own, bias.numpy()), atol=1e-6)


def test_the_joint_loss_of_apprentice_and_teacher():
    zt, za = drawn(5, 4), drawn(5, 4, seed=1)
    own = lambda t, a: distill.joint_loss(t, a, LABELS, (1.0, 0.5, 0.25), detached=False)  # noqa: E731
    assert torch.autograd.gradcheck(own, (zt.requires_grad_(), za.requires_grad_()))
    apart = gradient(distill.joint_loss(zt, za, LABELS, (1.0, 0.5, 0.25)), zt)
    assert np.allclose(
        apart, differences(lambda z: oracles.cross_entropy(z, Y), zt.detach().numpy()), atol=1e-7
    )


@pytest.mark.parametrize("term", ["kl", "mse"])
def test_the_term_of_codistillation(term):
    method = codistill(term=term, temperature=2.0)
    outputs, heard = drawn(5, 4).requires_grad_(), drawn(5, 4, seed=1)
    targets = (heard / 2).softmax(1) if term == "kl" else heard
    assert torch.autograd.gradcheck(lambda z: method.disagreement(z, targets), outputs)
    wanted = (
        4 * oracles.kl(targets.numpy(), oracles.softmax(outputs.detach().numpy(), 2))
        if term == "kl"
        else 0.5 * np.mean((outputs.detach().numpy() - heard.numpy()) ** 2)
    )
    assert method.disagreement(outputs, targets).item() == pytest.approx(wanted)
