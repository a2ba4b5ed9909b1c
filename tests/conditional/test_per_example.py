"""What each example, or each position, decides for itself: exits, policies, controllers, halting, stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distcomp
from distcomp.conditional import (
    BlockPolicy,
    GatedStage,
    PolicyLosses,
    QController,
    SpatialHalting,
    average_products,
    exits,
    rate_loss,
    taken_shares,
)
from distcomp.conditional.controller import run_on_rows
from distcomp.conditional.early_exits import entropy
from distcomp.conditional.policy import block_sparse_relu
from tests.conditional.per_example_jobs import zeros_are_sent


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- exits


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.rows = []

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        self.rows.append(len(x))
        return self.last(x)


def chain_with_exits(weights=(1.0, 0.5, 0.3)):
    model = Chain()
    torch.manual_seed(1)
    return model, exits(model, {"first": nn.Linear(8, 4), "second": nn.Linear(8, 4)}, weights)


def test_entropy_is_the_formula():
    scores = drawn(5, 4)
    p = np.exp(scores.double().numpy())
    p /= p.sum(1, keepdims=True)
    assert np.allclose(entropy(scores).numpy(), -(p * np.log(p)).sum(1), atol=1e-6)


def test_the_joint_loss_is_the_weighted_sum():
    model, sides = chain_with_exits()
    x, y = drawn(7, 6), torch.arange(7) % 4
    loss = sides.loss(model(x), y)
    h1 = torch.nn.functional.linear(x, model.first.weight, model.first.bias)
    h2 = torch.nn.functional.linear(torch.relu(h1), model.second.weight, model.second.bias)
    z = torch.nn.functional.linear(torch.relu(h2), model.last.weight, model.last.bias)
    ce = nn.functional.cross_entropy
    wanted = ce(sides.heads[0](h1), y) + 0.5 * ce(sides.heads[1](h2), y) + 0.3 * ce(z, y)
    assert torch.allclose(loss, wanted)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(distcomp.DistcompError, match="0 of 2 heads saw the last forward"):
        sides.loss(z, y)


@given(st.integers(0, 10_000), st.floats(0, 0.5), st.floats(0, 0.5))
def test_wanted_shares_leave_and_rows_are_dropped(seed, first, second):
    model, sides = chain_with_exits()
    model.eval()
    x = drawn(40, 6, seed=seed)
    sides.calibrate(x, (first, second))
    model.rows.clear()
    answers = sides.answer(x)
    taken = torch.bincount(answers.exits, minlength=3).tolist()
    assert taken[:2] == [round(first * 40), min(round(second * 40), 40 - taken[0])]
    assert sum(model.rows) == 40 - taken[0] - taken[1]
    h1 = nn.functional.linear(x, model.first.weight, model.first.bias)
    sure = entropy(sides.heads[0](h1))
    assert torch.equal(answers.exits == 0, sure < sides.thresholds[0])
    assert torch.allclose(
        answers.scores[answers.exits == 0], sides.heads[0](h1)[answers.exits == 0], atol=1e-6
    )
    whole = model(x)
    assert torch.allclose(answers.scores[answers.exits == 2], whole[answers.exits == 2], atol=1e-6)


def test_all_may_leave_at_once():
    model, sides = chain_with_exits()
    model.eval()
    answers = sides.answer(drawn(5, 6), lambda number, sure: torch.ones_like(sure, dtype=torch.bool))
    assert answers.exits.tolist() == [0] * 5
    assert model.rows == []
    sides.remove()
    assert not hasattr(model, "exits")


def test_a_sequential_model_has_exits():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = drawn(5, 6)
    wanted = model(x)
    sides = exits(model, {"1": nn.Linear(8, 4)})
    scores = model(x)
    assert torch.equal(scores, wanted)
    assert torch.isfinite(sides.loss(scores, torch.arange(5) % 4))
    assert "exits.0.weight" in model.state_dict()


def test_average_products():
    assert average_products((10, 30, 100), torch.tensor([0, 0, 1, 2])) == (10 + 10 + 30 + 100) / 4


# --------------------------------------------------------------------------------------------------- policy


@given(st.integers(0, 10_000))
def test_block_sparse_products_are_masked_ones(seed):
    x, weight, bias = drawn(6, 5, seed=seed), drawn(12, 5, seed=seed + 1), drawn(12, seed=seed + 2)
    taken = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = taken.repeat_interleave(3, 1)
    wanted = torch.relu(x @ weight.t() + bias) * mask
    assert torch.allclose(block_sparse_relu(x, weight, bias, taken), wanted, atol=1e-6)


def test_block_sparse_products_have_the_gradient():
    shapes = ((4, 3), (6, 3), (6,))
    x, weight, bias = (
        drawn(*shape, seed=seed, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes)
    )
    taken = torch.tensor([[True, False], [True, False], [False, False], [True, False]])
    assert torch.autograd.gradcheck(lambda *a: block_sparse_relu(*a, taken).sin(), (x, weight, bias))
    block_sparse_relu(x, weight, bias, taken).sum().backward()
    assert torch.equal(weight.grad[3:], torch.zeros(3, 3, dtype=torch.float64))


def test_the_policys_losses_are_the_papers():
    layer = BlockPolicy(5, 12, 4, rate=0.3)
    with torch.no_grad():
        layer.policy.weight.copy_(drawn(4, 5))
        layer.baseline.fill_(0.7)
    x, losses = drawn(6, 5, seed=3), drawn(6, seed=4).abs()
    layer(x)
    p = 1 / (
        1 + np.exp(-(x.numpy() @ layer.policy.weight.detach().numpy().T + layer.policy.bias.detach().numpy()))
    )
    p = p.clip(0.02, 0.98)
    u = layer.taken.numpy()
    log_probability = (u * np.log(p) + (1 - u) * np.log(1 - p)).sum(1)
    reinforce = ((losses.numpy() - 0.7) * log_probability).mean()
    sparsity = ((p.mean(0) - 0.3) ** 2).sum() + 4 * ((p.mean(1) - 0.3) ** 2).mean()
    variance = -p.var(0, ddof=1).sum()
    got = layer.losses(losses, PolicyLosses(2.0, 3.0, 5.0))
    assert got.item() == pytest.approx(2 * reinforce + 3 * sparsity + 5 * variance, rel=1e-4)
    assert layer.baseline.item() == pytest.approx(0.7 + 0.1 * (losses.mean().item() - 0.7))
    layer(x[:1])
    assert torch.isfinite(layer.losses(losses[:1]))


def test_reinforce_points_where_losses_are_lower():
    """The gradient of the REINFORCE term is that of E[loss], estimated by many coins."""
    layer = BlockPolicy(1, 2, 2, rate=0.5)
    with torch.no_grad():
        layer.policy.weight.zero_()
        layer.policy.bias.zero_()
    x = drawn(20_000, 1)
    layer(x)
    losses = layer.taken[:, 0].float()  # block 0 costs 1
    layer.losses(losses, PolicyLosses(1.0, 0.0, 0.0)).backward()
    gradient = layer.policy.bias.grad
    assert gradient[0].item() == pytest.approx(0.25, abs=0.02)  # d sigmoid(b)/db = 1/4
    assert abs(gradient[1].item()) < 0.02


# ----------------------------------------------------------------------------------------------- controller


def test_rows_go_to_what_they_chose():
    modules = [nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)]
    x, chosen = drawn(7, 3), torch.tensor([2, 0, 0, 2, 2, 0, 2])
    out = run_on_rows(modules, x, chosen)
    for row, number in enumerate(chosen.tolist()):
        assert torch.allclose(out[row], modules[number](x[row]), atol=1e-6)
    out.sum().backward()
    assert torch.equal(modules[1].weight.grad, torch.zeros(2, 3))


def test_the_controllers_loss_is_the_reward_it_missed():
    node = QController(3, [nn.Linear(3, 2), nn.Linear(3, 2)], costs=(0.1, 1.0), trade=0.8)
    node.epsilon = 0.0
    x, y = drawn(9, 3), torch.arange(9) % 2
    scores = node(x)
    q = node.value(x)
    best = q.argmax(1)
    assert torch.equal(node.chosen, best)
    right = (scores.argmax(1) == y).double().numpy()
    reward = 0.8 * right - 0.2 * np.where(best.numpy() == 0, 0.1, 1.0)
    expected = q.detach().double().numpy()[np.arange(9), best.numpy()]
    wanted = nn.functional.cross_entropy(scores, y).item() + ((expected - reward) ** 2).mean()
    assert node.loss(scores, y).item() == pytest.approx(wanted, rel=1e-5)
    node.epsilon = 1.0
    node(drawn(400, 3))
    assert 100 < int(node.chosen.sum()) < 300
    node.eval()
    node(x)
    assert torch.equal(node.chosen, best)


# -------------------------------------------------------------------------------------------------- halting


def by_position(stage, x):
    """The stage as the paper writes it, one position at a time, from the units' own outputs."""
    n, c, h, w = x.shape
    y, units, remainders = np.zeros((n, c, h, w)), np.zeros((n, h, w)), np.zeros((n, h, w))
    total, active = np.zeros((n, h, w)), np.ones((n, h, w), bool)
    for number, unit in enumerate(stage.units):
        mask = torch.tensor(active[:, None], dtype=x.dtype)
        x = x + mask * unit.mix(torch.relu(unit.wide(x)))
        score = torch.sigmoid(unit.score(x))[:, 0].detach().numpy()
        if number + 1 == len(stage.units):
            score = np.ones_like(score)
        values = x.detach().numpy()
        for i in np.ndindex(n, h, w):
            if not active[i]:
                continue
            units[i] += 1
            at = (i[0], slice(None), i[1], i[2])
            if total[i] + score[i] >= 1 - stage.epsilon:
                remainders[i] = 1 - total[i]
                y[at] += remainders[i] * values[at]
                active[i] = False
            else:
                y[at] += score[i] * values[at]
                total[i] += score[i]
    return y, units, remainders


def test_halting_is_the_papers_and_gathering_changes_nothing():
    torch.manual_seed(0)
    stage = SpatialHalting(3, 4, bias=0.0)
    x = drawn(2, 3, 5, 6)
    y = stage(x)
    wanted, units, remainders = by_position(stage, x)
    assert np.allclose(y.detach().numpy(), wanted, atol=1e-5)
    assert np.array_equal(stage.ponder.units.numpy(), units)
    assert len(np.unique(units)) > 1
    assert np.allclose(stage.ponder.remainder.detach().numpy(), remainders, atol=1e-6)
    assert stage.ponder.cost.item() == pytest.approx((units + remainders).mean(), rel=1e-5)
    stage.eval()
    assert torch.allclose(stage(x), y, atol=1e-5)
    stage.gathered = False
    assert torch.allclose(stage(x), y, atol=1e-5)


def test_halting_has_the_gradient_and_ponder_cost_makes_it_sooner():
    torch.manual_seed(1)
    stage = SpatialHalting(2, 3, bias=-1.0).double()
    x = drawn(1, 2, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: stage(one).sin(), (x,))
    stage(x)
    stage.ponder.cost.backward()
    assert float(stage.units[0].score.bias.grad) < 0  # a higher score is a lower cost


# --------------------------------------------------------------------------------------------------- stages


def test_a_stage_runs_on_the_rows_that_go_through():
    torch.manual_seed(0)
    stage = GatedStage(nn.Linear(4, 4), 4, bias=0.0).eval()
    x = drawn(10, 4)
    out = stage(x)
    gates = stage.gate(x).squeeze(1) > 0
    assert 0 < gates.sum() < 10
    wanted = torch.where(gates[:, None], x + stage.branch(x), x)
    assert torch.allclose(out, wanted, atol=1e-6)
    assert rate_loss(stage, 0.5).item() == pytest.approx((gates.float().mean().item() - 0.5) ** 2, abs=1e-6)
    assert taken_shares(stage) == [pytest.approx(gates.float().mean().item())]
    stage.train()
    shares = []
    for seed in range(30):
        stage(drawn(100, 4, seed=seed) * 1e-3)
        shares += taken_shares(stage)
    assert abs(np.mean(shares) - 0.5) < 0.05
    rate_loss(stage, 0.0).backward()
    assert float(stage.gate.bias.grad) > 0  # towards fewer


# ----------------------------------------------------------------------- what examples decide is not sent for


def test_what_no_example_takes_is_zero_and_sent_all_the_same(cluster):
    for alike, sent in cluster(2).run(zeros_are_sent):
        assert alike
        assert len(set(sent)) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: exits(Chain(), {"third": nn.Linear(8, 4)}), "no module 'third'"),
        (lambda: exits(Chain(), {"first": nn.Linear(8, 4)}, (1.0,)), "need 2 weights, not 1"),
        (lambda: chain_with_exits()[1].answer(drawn(2, 6)), "in training mode"),
        (lambda: chain_with_exits()[1].calibrate(drawn(2, 6), (0.9, 0.9)), "cannot leave at 2 heads"),
        (lambda: BlockPolicy(4, 10, 3), "do not fit 10 units"),
        (lambda: QController(3, [nn.Linear(3, 2)], (1.0, 2.0)), "1 choices have 2 costs"),
        (lambda: QController(3, [nn.Linear(3, 2)], (1.0,), trade=2), "a share in"),
        (lambda: SpatialHalting(3, 0), "make no stage"),
        (lambda: GatedStage(nn.Linear(4, 3), 4, bias=9.0)(drawn(2, 4)), "keeps the shape"),
        (lambda: rate_loss(Chain(), 0.5), "has no GatedStage"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(distcomp.DistcompError, match=words):
        make()
