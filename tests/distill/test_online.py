"""Networks that teach each other, and the apprentice: the equations, and who reaches whose weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from distcomp import distill, precision
from distcomp.distill.kdgan import relaxed
from distcomp.errors import DistcompError
from distcomp.randomness import Key
from tests.distill import oracles
from tests.distill.networks import mlp, rows


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 3, -1, 2, 1])


def test_mutual_learning_is_the_papers():
    logits = [drawn(5, 4, seed=i) for i in range(3)]
    found = distill.mutual_loss(logits, LABELS, 0.7)
    assert found.item() == pytest.approx(oracles.mutual([z.numpy() for z in logits], LABELS.numpy(), 0.7))


def test_mutual_learners_teach_nobody_but_themselves():
    """What network 0 is pulled by does not pull network 1: the other's logits are detached."""
    both = distill.MutualLearners([mlp(8), mlp(12, seed=1)])
    x, y = rows(16)
    none = torch.full_like(y, -1)
    logits = both(x)
    distill.mutual_loss(logits, none).backward()
    own = copy.deepcopy(both.networks[0])
    own.zero_grad()
    targets = logits[1].detach().softmax(1)
    nn.functional.kl_div(own(x).log_softmax(1), targets, reduction="batchmean").backward()
    for p, q in zip(both.networks[0].parameters(), own.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_an_on_the_fly_ensemble_is_the_papers(weight):
    torch.manual_seed(0)
    ensemble = distill.OnTheFlyEnsemble(nn.Linear(6, 8), nn.Linear(8, 4), 8, 3).double()
    given = ensemble(drawn(5, 6))
    each, gate = [z.detach().numpy() for z in given.each], given.gate.detach().numpy()
    wanted, mixed = oracles.one(each, gate, LABELS.numpy(), 3.0, weight)
    assert np.allclose(given.ensemble.detach().numpy(), mixed)
    assert np.allclose(gate.sum(1), 1)
    loss = distill.ensemble_loss(given, LABELS, 3.0, f"0 -> {weight} @ 10", step=10)
    assert loss.item() == pytest.approx(wanted)


def test_an_exported_branch_is_a_plain_network_and_the_ensemble_is_not_pulled():
    torch.manual_seed(0)
    one = distill.OnTheFlyEnsemble(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4), 8, 2)
    assert not torch.equal(one.branches[0].weight, one.branches[1].weight)
    x, y = rows(16)
    given = one(x)
    assert torch.equal(one.export(1)(x), given.each[1])
    assert distill.training_factor(one, one.export()) > 1
    none = torch.full_like(y, -1)
    (distill.ensemble_loss(given, none)).backward()
    assert one.gate[0].weight.grad is None or not one.gate[0].weight.grad.any()  # no label reaches the gate


def test_maps_are_pooled_for_the_gate():
    torch.manual_seed(0)
    stem, branch = nn.Conv2d(1, 3, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    given = distill.OnTheFlyEnsemble(stem, branch, 3)(torch.randn(5, 1, 4, 4))
    assert given.ensemble.shape == (5, 4)
    assert given.gate.shape == (5, 3)


def test_kdgan_is_the_papers():
    torch.manual_seed(0)
    game = distill.KDGAN(
        nn.Linear(6, 4), nn.Linear(6, 4), distill.LabelDiscriminator(6, 4, 5), 0.4, 0.6, 0.2, "1 ~> 0.3 @ 10"
    ).double()
    x = drawn(5, 6)
    found = game.terms(x, LABELS, step=5, rank=1)
    zc, zt = game.classifier(x), game.teacher(x)
    key = Key.of(0, 5).fold("kdgan", 1)
    sc, st = relaxed(zc, 0.65, key.fold("classifier")), relaxed(zt, 0.65, key.fold("teacher"))

    def d(label):
        return game.discriminator(x, torch.as_tensor(label)).detach().numpy()

    arrays = [t.detach().numpy() for t in (zc, zt, sc, st)]
    wanted = oracles.kdgan(*arrays, d, LABELS.numpy(), 0.4, 0.6, 0.2)
    assert [found.classifier.item(), found.teacher.item(), found.discriminator.item()] == pytest.approx(
        wanted
    )
    assert torch.equal(game(x, LABELS, 5, 1), found.total)


def test_no_player_reaches_anothers_weights():
    torch.manual_seed(0)
    game = distill.KDGAN(nn.Linear(6, 4), nn.Linear(6, 4), distill.LabelDiscriminator(6, 4))
    x, y = rows(8)
    players = {"classifier": game.classifier, "teacher": game.teacher, "discriminator": game.discriminator}
    for name in players:
        game.zero_grad()
        getattr(game.terms(x, y, 0), name).backward()
        reached = {
            other
            for other, net in players.items()
            if any(p.grad is not None and p.grad.any() for p in net.parameters())
        }
        assert reached == {name}


def test_gumbel_samples_have_the_frequencies_of_the_softmax():
    z = torch.log(torch.tensor([0.1, 0.2, 0.7])).expand(20000, 3)
    samples = relaxed(z, 0.1, Key.of(1))
    assert torch.allclose(samples.sum(1), torch.ones(20000))
    shares = samples.argmax(1).bincount() / 20000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.015)
    assert torch.equal(samples, relaxed(z, 0.1, Key.of(1)))


@pytest.mark.parametrize("detached", [True, False])
def test_the_apprentices_joint_loss_is_the_papers(detached):
    zt, za = drawn(5, 4).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()
    loss = distill.joint_loss(zt, za, LABELS, (1.0, 0.5, 0.25), detached)
    arrays = zt.detach().numpy(), za.detach().numpy(), LABELS.numpy()
    assert loss.item() == pytest.approx(oracles.apprentice(*arrays, 1.0, 0.5, 0.25))
    (gradient,) = torch.autograd.grad(loss, zt)
    alone = nn.functional.cross_entropy(zt, LABELS, ignore_index=-1)
    assert torch.allclose(gradient, torch.autograd.grad(alone, zt)[0]) is detached


def test_the_apprentices_three_schemes_train_few_bits():
    def converter(model):
        return precision.ttq(model)

    x, y = rows(64)
    teacher = mlp(24, seed=1)
    joint = distill.TeacherAndApprentice(copy.deepcopy(teacher), mlp(12), converter)  # A
    assert distill.training_factor(joint, joint.apprentice) > 2
    optimizer = torch.optim.Adam(joint.parameters(), 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = distill.joint_loss(*joint(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = joint.teacher
    student = converter(mlp(12))  # B
    teach = distill.Distill(student, trained, distill.apprentice())
    teach(x, y).backward()
    arrays = trained(x).detach().double().numpy(), student(x).detach().double().numpy(), y.numpy()
    assert sum(teach.last.values()) == pytest.approx(oracles.apprentice(*arrays, 0.0, 0.5, 0.5), rel=1e-4)
    full = mlp(12)  # C
    tuned, quarter = distill.fine_tuned(
        full, converter, lambda m, lr: torch.optim.SGD(m.parameters(), lr), 0.4
    )
    assert quarter.param_groups[0]["lr"] == 0.1
    assert len(tuned[2].weight.unique()) <= 3


def both_heads(student):
    loss = distill.fitnet_hint("1", "1", nn.Linear(8, 12))
    distill.install_heads(student, loss.heads())
    return student


@pytest.mark.parametrize(
    ("make", "trained", "kept"),
    [
        (lambda: distill.MutualLearners([nn.Linear(6, 4), nn.Linear(6, 5)]), 28 + 35, 28),
        (
            lambda: distill.OnTheFlyEnsemble(nn.Linear(6, 8), nn.Linear(8, 4), 8, 3),
            56 + 3 * 36 + (27 + 6),
            56 + 36,
        ),
        (
            lambda: distill.KDGAN(nn.Linear(6, 4), nn.Linear(6, 5), distill.LabelDiscriminator(6, 4, 2)),
            28 + 35 + (22 + 3),
            28,
        ),
        (lambda: distill.TeacherAndApprentice(nn.Linear(6, 5), nn.Linear(6, 4)), 35 + 28, 28),
        (lambda: both_heads(mlp(8)), 56 + 72 + 36 + 108, 56 + 72 + 36),
        (lambda: mlp(8), 164, 164),
    ],
    ids=["mutual", "one", "kdgan", "apprentice", "heads", "plain"],
)
def test_what_is_trained_and_dropped_is_told(make, trained, kept):
    said = distill.summary(make())
    assert (said.trained, said.kept) == (trained, kept)
    assert f"{trained / kept:.2f} times" in str(said)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.MutualLearners([mlp()]), "2 networks"),
        (lambda: distill.OnTheFlyEnsemble(mlp(), mlp(), 4, 1), "2 branches"),
        (lambda: distill.KDGAN(mlp(), mlp(), mlp(), alpha=2), "alpha"),
        (lambda: distill.apprentice(-1), "weights of 0"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(DistcompError, match=words):
        make()
