"""Each loss equals its paper's equations; its gradient is right, and reaches the student alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp import distill
from distcomp.distill import Lesson, NetworkOutput, losses
from distcomp.errors import DistcompError
from distcomp.randomness import Key
from tests.distill import oracles


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(objective, student, teacher, labels=None, step=0, key=None):
    """The loss of what student and teacher gave."""
    ours = student if isinstance(student, NetworkOutput) else NetworkOutput(student)
    theirs = teacher if isinstance(teacher, NetworkOutput) else NetworkOutput(teacher)
    return sum(objective.terms(Lesson(ours, theirs, labels, step, key or Key.of(0))).values())


@settings(max_examples=25, deadline=None)
@given(
    T=st.sampled_from([1.0, 2.5, 8.0]),
    a=st.sampled_from([0.0, 0.3, 1.0]),
    mean=st.sampled_from(["arithmetic", "geometric"]),
    labelled=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 9),
)
def test_hintons_loss_is_the_papers(T, a, mean, labelled, seed):
    zs, z1, z2 = (3 * drawn(6, 5, seed=3 * seed + i) for i in range(3))
    y = torch.where(torch.tensor(labelled), torch.arange(6) % 5, -1)
    taught = NetworkOutput(0.75 * z1 + 0.25 * z2, {}, (z1, z2), (0.75, 0.25))
    found = value(distill.hinton(T, a, mean), zs, taught, y)
    wanted = oracles.hinton(zs.numpy(), [z1.numpy(), z2.numpy()], [0.75, 0.25], y.numpy(), T, a, mean)
    assert found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_a_batch_without_labels_has_the_teachers_term_alone():
    zs, zt, none = drawn(4, 3), drawn(4, 3, seed=1), torch.full((4,), -1)
    found = value(distill.hinton(2, 0.5), zs, zt, none)
    assert torch.equal(found, value(distill.hinton(2, 0.5), zs, zt, none))
    assert found.item() == pytest.approx(0.5 * value(distill.hinton(2, 1.0), zs, zt).item())


def test_at_high_temperature_hinton_is_mimicking():
    """The paper's section 2.1: with logits centred, T^2 KL tends to 1/(2 classes) sum (z - v)^2 per row."""
    zs, zt = (losses.centred(drawn(8, 5, seed=i)) for i in range(2))
    hot = value(distill.hinton(1e4, 1.0), zs, zt)
    assert hot.item() == pytest.approx(value(distill.mimic(), zs, zt).item(), rel=1e-3)


def test_smoothing_is_the_papers():
    z, y = drawn(5, 4), torch.tensor([0, 3, -1, 2, 1])
    found = value(distill.hard_labels(smoothing=0.1), z, z, y)
    assert found.item() == pytest.approx(oracles.cross_entropy(z.numpy(), y.numpy(), 0.1))


def test_pseudo_labels_are_the_likeliest_classes():
    zs, zt = drawn(5, 4), drawn(5, 4, seed=1)
    wanted = oracles.cross_entropy(zs.numpy(), zt.numpy().argmax(1))
    assert value(distill.pseudo_labels(), zs, zt).item() == pytest.approx(wanted)


@pytest.mark.parametrize("standardised", [False, True])
def test_mimicking_is_the_papers(standardised):
    zs, zt = drawn(6, 4), drawn(6, 4, seed=1)
    mu, sigma = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    given_ = (mu, sigma) if standardised else None
    wanted = oracles.mimic(zs.numpy(), zt.numpy(), *(t.double().numpy() for t in given_ or ()))
    assert value(distill.mimic(standardised=given_), zs, zt).item() == pytest.approx(wanted, rel=1e-6)


def test_standardised_logits_have_mean_0_and_deviation_1():
    teacher = torch.nn.Linear(6, 4)
    batches = [drawn(20, 6, seed=i).float() for i in range(3)]
    mu, sigma = distill.standardisation(teacher, batches)
    rows = torch.cat([losses.centred(teacher(batch)) for batch in batches])
    standardised = (rows - mu) / sigma
    assert torch.allclose(standardised.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(standardised.std(0, correction=0), torch.ones(4), atol=1e-4)


def test_noise_is_in_a_share_of_the_rows_and_as_large_as_said():
    z = 1 + drawn(4000, 3).abs()
    noisy = losses.noisy_logits(z, 0.25, 0.5, Key.of(1))
    xi = noisy / z - 1
    rows = (xi != 0).all(1)
    assert torch.equal(rows, (xi != 0).any(1))
    assert rows.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert xi[rows].std().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(noisy, losses.noisy_logits(z, 0.25, 0.5, Key.of(1)))
    assert not torch.equal(noisy, losses.noisy_logits(z, 0.25, 0.5, Key.of(2)))


def test_a_noisy_teacher_is_mimicked_with_its_noise():
    zs, zt = drawn(6, 4), drawn(6, 4, seed=1)
    key = Key.of(3)
    noisy = losses.noisy_logits(zt, 0.5, 1.0, key.fold("noisy teacher"))
    found = value(distill.mimic(noise=1.0), zs, zt, key=key)
    assert found.item() == pytest.approx(oracles.mimic(zs.numpy(), noisy.numpy()))


def test_a_hint_is_the_papers():
    guided, hint = drawn(3, 4, 2, 2), drawn(3, 4, 2, 2, seed=1)
    objective = distill.fitnet_hint("s", "t", torch.nn.Identity(), weight=2.0)
    found = value(objective, NetworkOutput(guided, {"s": guided}), NetworkOutput(hint, {"t": hint}))
    assert found.item() == pytest.approx(2 * oracles.hint(guided.numpy(), hint.numpy()))


def test_attention_is_the_papers():
    fs, ft, gs, gt = (
        drawn(3, 4, 5, 2),
        drawn(3, 7, 5, 2, seed=1),
        drawn(3, 2, 3, 3),
        drawn(3, 9, 3, 3, seed=2),
    )
    objective = distill.attention({"a": "b", "c": "d"}, beta=30)
    found = value(objective, NetworkOutput(fs, {"a": fs, "c": gs}), NetworkOutput(ft, {"b": ft, "d": gt}))
    wanted = 30 * (oracles.attention(fs.numpy(), ft.numpy()) + oracles.attention(gs.numpy(), gt.numpy()))
    assert found.item() == pytest.approx(wanted)


def test_factors_are_the_papers():
    torch.manual_seed(0)
    paraphraser = distill.Paraphraser(4, 2).double()
    ours, theirs = drawn(3, 2, 5, 5), drawn(3, 4, 5, 5, seed=1)
    objective = distill.factor_transfer("s", "t", paraphraser, distill.Translator(3, 2), beta=50)
    found = value(objective, NetworkOutput(ours, {"s": ours}), NetworkOutput(theirs, {"t": theirs}))
    wanted = 50 * oracles.factor(ours.numpy(), paraphraser.factor(theirs).numpy())
    assert found.item() == pytest.approx(wanted)


def test_a_paraphraser_has_the_papers_shapes_and_learns():
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.ReLU())
    paraphraser = distill.Paraphraser(6, 3)
    batches = [drawn(16, 1, 6, 6, seed=i).float() for i in range(5)]
    untrained = torch.nn.functional.mse_loss(paraphraser(teacher(batches[-1])), teacher(batches[-1]))
    error = distill.train_paraphraser(teacher, "1", batches * 12, paraphraser, 3e-3)
    assert paraphraser.factor(teacher(batches[0])).shape == (16, 3, 6, 6)
    assert error < 0.75 * untrained.item()
    assert not any(p.requires_grad for p in paraphraser.parameters())


@pytest.mark.parametrize(
    "objective",
    [distill.hinton(3, 0.4), distill.mimic(), distill.pseudo_labels(), distill.hard_labels(smoothing=0.2)],
    ids=["hinton", "mimic", "pseudo_labels", "smoothing"],
)
def test_gradients_of_logits(objective):
    zt, y = drawn(4, 3, seed=1), torch.tensor([0, -1, 2, 1])
    zs = drawn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: value(objective, z, zt, y), zs)


@pytest.mark.parametrize("distance", [losses.attention_distance, losses.factor_distance, losses.hint_error])
def test_gradients_of_features(distance):
    theirs = drawn(2, 3, 2, 2, seed=1)
    ours = drawn(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: distance(f, theirs), ours)


def test_weights_may_be_schedules():
    zs, zt, y = drawn(4, 3), drawn(4, 3, seed=1), torch.arange(4) % 3
    objective = distill.hinton("1 -> 4 @ 10", "0 ~> 1 @ 10")
    assert torch.equal(value(objective, zs, zt, y), value(distill.hard_labels(), zs, zt, y))
    late = value(objective, zs, zt, y, step=10)
    assert torch.equal(late, value(distill.hinton(4, 1.0), zs, zt))


def test_losses_add_up():
    zs, zt, y = drawn(4, 3), drawn(4, 3, seed=1), torch.arange(4) % 3
    both = value(distill.hard_labels() + distill.mimic(0.5) + distill.hinton(2, 1.0), zs, zt, y)
    alone = [distill.hard_labels(), distill.mimic(0.5), distill.hinton(2, 1.0)]
    assert both.item() == pytest.approx(sum(value(one, zs, zt, y).item() for one in alone))


def test_a_linear_bottleneck_is_the_nearest_product():
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5)
    x = torch.randn(3, 7)
    assert torch.allclose(distill.linear_bottleneck(layer, 5)(x), layer(x), atol=1e-5)
    product = distill.linear_bottleneck(layer, 2)
    values = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
    error = (product[1].weight @ product[0].weight - layer.weight).norm().item()
    assert error == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-4)
    with pytest.raises(DistcompError, match="rank"):
        distill.linear_bottleneck(layer, 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: distill.hinton(0), "temperature above 0"),
        (lambda: distill.hinton(weight=1.5), "weight in"),
        (lambda: distill.hinton(mean="median"), "arithmetic"),
        (lambda: distill.mimic(noise=-1), "noise"),
        (lambda: distill.attention([]), "none is named"),
        (lambda: distill.hard_labels(smoothing=1), "label smoothing"),
        (lambda: losses.attention_map(torch.ones(3, 4)), "maps"),
        (lambda: losses.hint_error(torch.ones(3, 4), torch.ones(3, 5)), "regressor"),
        (lambda: value(distill.hinton(), drawn(2, 3), drawn(2, 3)), "none were given"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(DistcompError, match=words):
        make()
