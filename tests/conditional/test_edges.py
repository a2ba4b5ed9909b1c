"""Conditional layers beside other features: recomputation, accumulation, averaging, copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import distcomp
from distcomp.conditional import (
    BlockPolicy,
    GatedStage,
    NoisyTopKGate,
    QController,
    UnitDropout,
    exits,
    stochastic_depth,
)
from tests.conditional import depth_jobs as jobs
from tests.conditional import edge_jobs


class Recomputed(nn.Module):
    """Six blocks and a wide layer, each behind a checkpoint of its own."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(jobs.Block() for _ in range(6))
        self.wide = nn.Linear(16, 16)
        self.reentrant = reentrant

    def forward(self, x):
        for part in (*self.blocks, self.wide):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def gradients_of(reentrant, layers, units):
    """Those of the input and the parameters, in each of four iterations."""
    net = Recomputed(reentrant)
    if layers:
        stochastic_depth(net, "blocks.*", last=0.3, seed=2)
    if units:
        UnitDropout(net, "wide", blocks=8, rate=0.5, seed=4)
    found = []
    for step in range(4):
        net.zero_grad()
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(step)).requires_grad_()
        net(x).sin().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters() if p.grad is not None and p.grad.any())])
    return found


@pytest.mark.parametrize("part", ["layers", "units"])
def test_both_forms_of_recomputation_have_the_coins_of_the_forward(part):
    plain, other, reentrant = (
        gradients_of(how, part == "layers", part == "units") for how in (None, False, True)
    )
    assert len({len(step) for step in plain}) > 1 or part == "units"
    for step in range(4):
        for each in (other, reentrant):
            assert len(plain[step]) == len(each[step])
            assert all(torch.allclose(a, b) for a, b in zip(plain[step], each[step], strict=True))


def test_what_accumulated_without_no_sync_is_stepped():
    net = jobs.Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    depth = stochastic_depth(net, "blocks.*", last=0.3, seed=5)
    for _ in range(3):
        optimizer.zero_grad()
        awake = []
        before = [block.fc.weight.detach().clone() for block in net.blocks]
        for micro in range(4):
            x, y = jobs.batch(0, micro)
            nn.functional.cross_entropy(net(x), y).backward()
            awake.append(depth.awake())
        optimizer.step()
        assert len(set(awake)) > 1
        for number, (block, old) in enumerate(zip(net.blocks, before, strict=True)):
            trained = any(f"blocks.{number}" in each for each in awake)
            assert torch.equal(block.fc.weight, old) != trained


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = jobs.Block()

    def forward(self, x):
        return self.block(x=x)


class Pair(jobs.Block):
    def forward(self, x):
        return super().forward(x), None


def test_blocks_that_cannot_be_dropped_are_named():
    net = ByKeyword()
    stochastic_depth(net, "block", last=0.5)
    with pytest.raises(distcomp.DistcompError, match="block was called without a positional input"):
        net(torch.randn(2, 16))
    pair = nn.Sequential(Pair())
    stochastic_depth(pair, "0", last=1.0)  # awake in every step
    with pytest.raises(distcomp.DistcompError, match="0 does not return a tensor shaped as its input"):
        pair(torch.randn(2, 16))


@pytest.fixture(scope="module")
def told(cluster):
    return cluster(2).run(edge_jobs.edges)


def test_rows_trained_earlier_in_a_period_are_averaged(told):
    assert [each["rows_of_a_period"] for each in told] == [(True, True)] * 2


def test_an_attached_model_with_unit_dropout_is_copied(told):
    assert [each["copied"] for each in told] == [(True, True)] * 2


def test_codistillation_trains_the_layers_of_its_forward(told):
    for each in told:
        steps = each["layers_with_codistillation"]
        assert len({tuple(ran) for ran, _ in steps}) > 1
        assert all(ran == moved for ran, moved in steps)


def test_marked_experts_are_not_averaged(told):
    assert [each["own_experts"] for each in told] == [(True, True)] * 2


def test_gradients_of_spread_experts_are_clipped_as_in_one_process(cluster):
    for far, off, parted in cluster(2).run(edge_jobs.clipped):
        assert far < 1e-6
        assert off < 1e-6
        assert parted


def test_experts_that_ddp_would_reduce_are_named(cluster):
    for name, outside in (("1.up", False), ("up", True)):
        for words in cluster(2).run(edge_jobs.forgotten, outside):
            assert words.startswith(f"{name} is this rank's own and DistributedDataParallel reduces it")


def test_a_mixture_that_is_the_whole_model_keeps_its_experts(cluster):
    for experts_alike, gate_alike in cluster(2).run(edge_jobs.outermost):
        assert experts_alike
        assert not gate_alike


# -------------------------------------------------------------------------- what examples decide


def test_a_gate_hears_from_rows_that_stay_out():
    torch.manual_seed(0)
    stage = GatedStage(nn.Linear(4, 4), 4, bias=0.0)
    x = torch.randn(12, 4)
    out = stage(x)
    stage.taken.retain_grad()
    out.sum().backward()
    assert 0 < stage.taken.detach().sum() < 12
    assert torch.allclose(stage.taken.grad, stage.branch(x).sum(1))
    assert torch.allclose(out, x + stage.taken.detach()[:, None] * stage.branch(x))


def test_a_stage_with_batch_normalisation_trains_where_one_row_goes_through():
    branch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    stage = GatedStage(branch, 4, bias=0.0)
    x = torch.cat([torch.ones(1, 4), -torch.ones(5, 4)])
    with torch.no_grad():
        stage.gate.weight.fill_(100.0)  # far beyond what a logistic draw changes
    stage(x).sum().backward()
    assert stage.taken.tolist() == [1, 0, 0, 0, 0, 0]
    assert torch.isfinite(stage.gate.weight.grad).all()


def test_exits_forget_a_training_forward_whose_loss_nobody_took():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    sides = exits(net, {"0": nn.Linear(4, 3)})
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    net(torch.randn(5, 4))
    loss = sides.loss(net(x), y)
    first = nn.functional.linear(x, net[0].weight, net[0].bias)
    wanted = nn.functional.cross_entropy(sides.heads[0](first), y) + nn.functional.cross_entropy(
        net[1](first), y
    )
    assert torch.allclose(loss, wanted)


def test_exits_see_a_recomputed_forward_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    sides = exits(net, {"0": nn.Linear(4, 3)})
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    for _ in range(2):
        sides.loss(checkpoint(net, x, use_reentrant=False), y).backward()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_rest_is_run_for_no_rows_where_others_gather_from_it(sharded, monkeypatch):
    """FSDP2 gathers a layer's weights from all ranks: one that skipped it would leave the others waiting."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    sides = exits(net, {"0": nn.Linear(4, 3), "1": nn.Linear(4, 3)})
    ran = []
    net[2].register_forward_hook(lambda *_: ran.append(1))
    monkeypatch.setattr("distcomp.conditional.early_exits.is_sharded", lambda module: sharded)
    net.eval()
    x = torch.randn(6, 4)
    answers = sides.answer(x, lambda number, entropies: entropies > 0)
    assert answers.exits.tolist() == [0] * 6
    assert bool(ran) == sharded
    assert sides.calibrate(x, (1.0, 0.0))[1] == 0.0


def test_an_input_that_comes_again_meets_other_coins_after_a_step():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    policy, stage = BlockPolicy(4, 8, 4), GatedStage(nn.Linear(4, 4), 4)
    gate, controller = NoisyTopKGate(4, 8), QController(4, [nn.Linear(4, 2), nn.Linear(4, 2)], (0, 1))

    def drawn():
        controller(x)
        stage(x)
        return policy._coins(x), gate.draw(x, x @ gate.clean), stage.taken.detach(), controller.chosen

    first, again = drawn(), drawn()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        for parameter in (policy.policy.weight, gate.clean, stage.gate.weight, controller.value[0].weight):
            parameter += 1e-6 * torch.rand(parameter.shape)
    changed = drawn()
    assert not any(torch.equal(a, b) for a, b in zip(first, changed, strict=True))
