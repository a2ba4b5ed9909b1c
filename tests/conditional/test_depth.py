"""Stochastic depth and layers that take turns, against the paper's equations and on real processes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import distcomp
from distcomp.active import Planned
from distcomp.conditional import UnitDropout, alternate_layers, freeze_layers, stochastic_depth
from distcomp.conditional.choices import Alternating, FrozenFrom, Sampled, Survival
from distcomp.layout import Layout
from distcomp.schedule import Schedule
from tests.conditional import depth_jobs as jobs

NAMES = tuple(f"blocks.{number}" for number in range(4))
PER_BLOCK = 16 * 16 + 16
OTHERS = 8 * 16 + 16 + 16 * 4 + 4


# ------------------------------------------------------------------------------------------------ the choice


def test_survival_falls_linearly_as_in_the_paper():
    choice = Survival(tuple("abcdefgh"), last=0.5)
    assert [choice.survival(name, 0) for name in "abcdefgh"] == [1 - depth / 8 * 0.5 for depth in range(1, 9)]
    uniform = Survival(tuple("ab"), last=0.7, shape="uniform")
    assert [uniform.survival(name, 0) for name in "ab"] == [0.7, 0.7]
    scheduled = Survival(("a", "b"), last=Schedule.parse("1 ~> 0 @ 10"))
    assert [scheduled.survival("b", step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_blocks_survive_as_often_as_they_should():
    choice = Survival(NAMES, last=0.2, seed=11)
    steps = 2000
    counts = [sum(name in choice.awake(step) for step in range(steps)) / steps for name in NAMES]
    for count, p in zip(counts, (0.8, 0.6, 0.4, 0.2), strict=True):
        assert abs(count - p) < 4 * (p * (1 - p) / steps) ** 0.5


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_choice_is_a_function_of_seed_and_step(seed, step):
    for make in (
        lambda: Survival(NAMES, 0.5, seed),
        lambda: Sampled(NAMES, 2, 3, seed),
        lambda: Alternating((NAMES[:2], NAMES[2:]), 5),
    ):
        assert make().awake(step) == make().awake(step)
    assert len(Sampled(NAMES, 2, 3, seed).awake(step)) == 2
    assert Sampled(NAMES, 2, 3, seed).awake(step // 3 * 3) == Sampled(NAMES, 2, 3, seed).awake(step)
    assert Alternating((NAMES[:2], NAMES[2:]), 5).awake(step) == set(
        NAMES[:2] if step // 5 % 2 == 0 else NAMES[2:]
    )


def test_frozen_from_a_step_of_its_own():
    choice = FrozenFrom(NAMES[:2], (3, 5))
    assert [len(choice.awake(step)) for step in (0, 2, 3, 4, 5, 9)] == [2, 2, 1, 1, 0, 0]


# ------------------------------------------------------------------------------------------------- the model


def test_evaluation_scales_what_a_block_adds():
    net, x = jobs.Net(), torch.randn(3, 8)
    depth = stochastic_depth(net, "blocks.*", last=0.5)
    net.eval()
    h = net.stem(x)
    for number, block in enumerate(net.blocks, 1):
        h = h + (1 - number / 4 * 0.5) * torch.relu(block.fc(h))
    assert torch.allclose(net(x), net.head(h), atol=1e-6)
    depth.remove()
    net.train()
    plain = jobs.Net()
    assert torch.equal(net(x), plain(x))
    assert type(net.blocks[0]) is jobs.Block


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.f(x) + x)


def test_a_branch_is_scaled_inside_the_relu_as_in_the_paper():
    net, x = nn.Sequential(Branched()), torch.randn(5, 4).abs()
    stochastic_depth(net, "0.f", last=0.0, branch=True)
    assert torch.equal(net(x), x)
    half = nn.Sequential(Branched()).eval()
    stochastic_depth(half, "0.f", last=0.5, branch=True)
    assert torch.allclose(
        half(x), torch.relu(0.5 * nn.functional.linear(x, half[0].f.weight, half[0].f.bias) + x)
    )


class Counted(jobs.Block):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


def test_a_dropped_block_is_not_computed_and_may_be_written_over():
    net = nn.Sequential(Counted(), nn.ReLU(inplace=True))
    depth = stochastic_depth(net, "0", last=0.0)
    x = torch.randn(2, 16, requires_grad=True)
    net(x).sum().backward()
    assert Counted.calls == 0
    assert depth.run_layers == 0
    assert net[0].fc.weight.grad is None
    assert torch.equal(x.grad, (x > 0).float())


def test_recomputed_activations_have_the_coins_of_their_iteration():
    net = jobs.Net()
    depth = stochastic_depth(net, "blocks.*", last=0.3, seed=8)
    plain = copy.deepcopy(jobs.Net())
    twin = stochastic_depth(plain, "blocks.*", last=0.3, seed=8)
    for step in range(5):
        x, y = jobs.batch(0, step)
        for model, whole in ((net, True), (plain, False)):
            model.zero_grad()
            out = checkpoint(model, x, use_reentrant=False) if whole else model(x)
            nn.functional.cross_entropy(out, y).backward()
        assert depth.awake() == twin.awake()
        for one, other in zip(net.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)


def test_no_decay_and_no_momentum_for_what_was_dropped():
    net = jobs.Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.5)
    depth = stochastic_depth(net, "blocks.*", last=0.3, seed=5)
    for step in range(8):
        before = {name: jobs.weights(net.get_submodule(name)) for name in NAMES}
        jobs.step_on(net, optimizer, 0, step)
        for name in NAMES:
            same = torch.equal(before[name], jobs.weights(net.get_submodule(name)))
            assert same == (name not in depth.awake())
    assert 0 < depth.run_layers < 32


def test_layers_that_take_turns_pass_gradients_on():
    net, twin = jobs.Net(), jobs.Net()
    alternate_layers(net, (["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]))
    x, y = jobs.batch(0, 0)
    for model in (net, twin):
        nn.functional.cross_entropy(model(x), y).backward()
    assert all(parameter.grad is None for parameter in net.blocks[3].parameters())
    for one, other in ((net.stem, twin.stem), (net.blocks[0], twin.blocks[0]), (net.head, twin.head)):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


def test_a_frozen_layer_stays():
    net = jobs.Net()
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    freeze_layers(net, "blocks.*", (0, 1, 2, 99))
    ends = []
    for step in range(3):
        jobs.step_on(net, optimizer, 0, step)
        ends.append([jobs.weights(block).clone() for block in net.blocks])
    assert torch.equal(ends[0][0], jobs.weights(jobs.Net().blocks[0]))
    assert torch.equal(ends[0][1], ends[2][1])
    assert torch.equal(ends[1][2], ends[2][2])
    assert not torch.equal(ends[1][3], ends[2][3])


def test_planned_bytes_are_those_of_the_layers_awake():
    choice = Survival(NAMES, 0.3, seed=2)
    layout = Layout.of([(name, tuple(p.shape)) for name, p in jobs.Net().named_parameters()])
    from distcomp.conditional import AwakeLayers

    for step in range(6):
        active = AwakeLayers(choice).active(layout, Planned(step))
        assert active.layout.numel == OTHERS + PER_BLOCK * len(choice.awake(step))


# --------------------------------------------------------------------------------------------- many processes


def bytes_between(size, awake, buckets):
    """An all-reduce of two ranks is what each sends of float32; each bucket compares 40 bytes."""
    return [4 * (OTHERS + PER_BLOCK * each) for each in awake]


@pytest.mark.parametrize("bucket_mb", [0.0005, 25])
def test_under_ddp_blocks_are_left_out_and_not_sent(cluster, bucket_mb):
    for distance, same, sent, awake in cluster(2).run(jobs.under_ddp, 14, bucket_mb):
        assert distance < 1e-5
        assert same
        assert len(set(awake)) > 2
        payload = bytes_between(2, awake, 1)
        overhead = [got - due for got, due in zip(sent, payload, strict=True)]
        assert all(0 < each < 700 for each in overhead), overhead


def test_plain_ddp_needs_no_find_unused_parameters(cluster):
    assert cluster(2).run(jobs.plain_ddp) == [(True, True)] * 2


def test_replicas_are_identical_over_many_steps(cluster):
    assert cluster(2).run(jobs.many_steps, 300) == [True, True]


def test_resume_is_bit_equal(cluster):
    assert cluster(2).run(jobs.resumed) == [True, True]


def test_micro_steps_share_their_iterations_coins(cluster):
    for iterations, distance in cluster(2).run(jobs.accumulated):
        assert iterations == 6
        assert distance < 1e-5


def test_coins_that_differ_are_named(cluster):
    for words in cluster(2).run(jobs.strayed, "private"):
        assert words.startswith("SettingsMismatch")
        assert "rank 1" in words
    for words in cluster(2).run(jobs.strayed, "resume"):
        assert words.startswith("Mismatch: the active parameters of rank 1 differ")
    for words in cluster(2).run(jobs.strayed, "compare"):
        assert words.startswith("Mismatch: rank 1 has other layers awake than rank 0 in iteration")


def test_private_coins_save_nothing(cluster):
    for sent, same in cluster(2).run(jobs.private):
        assert same
        assert set(sent) == {sent[0]}
        assert sent[0] >= 4 * (OTHERS + 4 * PER_BLOCK)


def test_averaging_sends_blocks_that_were_awake_since(cluster):
    for sent, awake, same in cluster(2).run(jobs.averaged):
        assert same
        assert len(set(awake)) > 1
        overhead = {got - 4 * (OTHERS + PER_BLOCK * each) for got, each in zip(sent, awake, strict=True)}
        assert len(overhead) == 1
        assert 0 < overhead.pop() < 300


def test_under_fsdp_dropped_blocks_are_neither_gathered_nor_reduced(cluster):
    whole = cluster(2).run(jobs.under_fsdp, 1.0)
    dropped = cluster(2).run(jobs.under_fsdp, 0.3)
    for (distance, sent, run), (far, less, fewer) in zip(whole, dropped, strict=True):
        assert distance < 1e-5
        assert far < 1e-5
        saved = (run - fewer) * PER_BLOCK * 4
        # reduce-scatter: half a block; forward and backward gather: half a block each
        assert abs((sent - less) - 1.5 * saved) < 0.1 * saved


def test_sampled_layers_train_alone(cluster):
    for kept, moved, sent in cluster(2).run(jobs.sampled):
        assert kept
        assert moved
        assert max(sent) < 4 * (OTHERS + 2 * PER_BLOCK) + 700


def test_a_record_says_what_the_environment_asked_for(monkeypatch):
    from distcomp.attaching.requested import _note
    from distcomp.recording import METHOD

    depth = stochastic_depth(jobs.Net())
    monkeypatch.setenv(METHOD, "qsgd:bits=4")
    handed_on = depth.active_only("qsgd:bits=4")
    assert _note(handed_on, handed_on, 0) == {"method": "qsgd:bits=4", "method_from": "environment"}
    own = depth.active_only("qsgd:bits=2")
    with pytest.warns(UserWarning, match="asks for another method"):
        assert _note(own, own, 0)["method_from"] == "script"


# ------------------------------------------------------------------------------------------------ shared rows


def test_unit_dropout_is_a_mask_over_rows():
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    units = UnitDropout(net, "0", blocks=4, rate=0.5, seed=3)
    x = torch.randn(7, 5)
    kept = units.rows.kept(0)
    assert 0 < kept.sum() < 12
    expected = net[2](
        torch.relu(nn.functional.linear(x, net[0].weight, net[0].bias) * kept * (12 / kept.sum()))
    )
    out = net(x)
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    assert not net[0].weight.grad[~kept].any()
    active = units.rows.active(Layout.of([("0.weight", (12, 5)), ("0.bias", (12,))]), Planned(0))
    assert active.layout.numel == int(kept.sum()) * 6
    net.eval()
    assert torch.allclose(net(x), net[2](torch.relu(nn.functional.linear(x, net[0].weight, net[0].bias))))


# -------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: stochastic_depth(net, "layers.*"), "no module is called 'layers.*'"),
        (lambda net: stochastic_depth(net, last=1.5), "a survival probability lies in"),
        (lambda net: stochastic_depth(net, coins="mine"), "coins are 'shared' or 'private'"),
        (lambda net: stochastic_depth(net, shape="cubic"), "survival falls 'linear'"),
        (lambda net: (stochastic_depth(net), stochastic_depth(net)), "has a switch already"),
        (lambda net: alternate_layers(net, (["blocks.0"], ["blocks.0"])), "in two of the groups"),
        (lambda net: freeze_layers(net, "blocks.*", (1, 2)), "2 iterations were given to freeze 4 layers"),
        (lambda net: UnitDropout(net, "stem", blocks=5), "5 blocks and a rate of 0.5 do not fit"),
        (lambda net: UnitDropout(net, "blocks", blocks=1), "is no nn.Linear"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(distcomp.DistcompError, match=words.replace("*", r"\*")):
        make(jobs.Net())


def test_shared_weights_and_other_shapes_are_refused():
    net = jobs.Net()
    net.blocks[0].fc.weight = net.blocks[1].fc.weight
    with pytest.raises(distcomp.DistcompError, match="is shared between"):
        stochastic_depth(net)
    other = nn.Sequential(nn.Linear(4, 3)).eval()
    stochastic_depth(other, "0")
    with pytest.raises(distcomp.DistcompError, match="no residual block"):
        other(torch.randn(2, 4))
    depth = stochastic_depth(jobs.Net())
    with pytest.raises(distcomp.DistcompError, match="make the switch with the same settings"):
        depth.load_state_dict({"choice": "another", "off": "skip", "step": 1})
    with pytest.raises(distcomp.DistcompError, match="damaged"):
        depth.load_state_dict({**depth.state_dict(), "step": -1})
