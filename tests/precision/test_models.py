"""Whole models: conversion in place, training, state dicts, copies, compile, removal, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distcomp import precision
from distcomp.compressors import FixedPoint
from distcomp.errors import DistcompError
from distcomp.precision.convert import converted, latent_of
from distcomp.precision.noise import StraightThrough

CONVERSIONS = {
    "fixed_point": lambda net: precision.fixed_point(net, "Q3.10"),
    "fixed_point inexact": lambda net: precision.fixed_point(net, "Q3.10", exact=False),
    "dorefa": precision.dorefa,
    "dorefa more bits": lambda net: precision.dorefa(net, 3, 4, 8),
    "binary_connect": precision.binary_connect,
    "binary_connect stochastic": lambda net: precision.binary_connect(net, stochastic=True, glorot=True),
    "bnn": lambda net: precision.bnn(bare(net)),
    "xnor_net": lambda net: precision.xnor_net(bare(net)),
    "few_multiplications": precision.few_multiplications,
    "ttq": precision.ttq,
    "weighted_entropy": lambda net: precision.weighted_entropy(net, 4, 4),
    "compact_binary": precision.compact_binary,
    "gradual": lambda net: precision.gradual(net, "Q3.5", "Q3.5"),
}
conversions = pytest.mark.parametrize("name", CONVERSIONS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


def bare(net: nn.Sequential) -> nn.Sequential:
    """Without ReLUs: what they leave has the sign +1 everywhere."""
    for name, child in list(net.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(net, name, nn.Identity())
    return net


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.flatten(1)[:, :3].argmax(1)


def train(
    net: nn.Module, steps: int, start: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for step in range(start, start + steps):
        x, y = data(step % 4)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@conversions
def test_a_converted_model_learns(name) -> None:
    net = CONVERSIONS[name](network())
    losses = train(net, 60, optimizer=torch.optim.Adam(net.parameters(), 0.01))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@conversions
def test_the_global_generator_is_left_alone(name) -> None:
    net = CONVERSIONS[name](network())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(net, 1)
    assert torch.equal(torch.rand(1), expected)


@conversions
def test_a_saved_model_goes_on_bit_for_bit(name) -> None:
    whole = CONVERSIONS[name](network())
    train(whole, 5)
    first = CONVERSIONS[name](network())
    train(first, 3)
    second = CONVERSIONS[name](network())
    second.load_state_dict(first.state_dict())
    train(second, 2, start=3)
    for (key, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@conversions
def test_a_copy_is_a_model_of_its_own(name) -> None:
    net = CONVERSIONS[name](network())
    train(net, 1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    twin = copy.deepcopy(net)
    losses = train(twin, 2)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert train(net, 2) == losses
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), twin.parameters(), strict=True))


@conversions
def test_removed_and_baked_it_is_plain_and_has_the_weights_it_computed_with(name) -> None:
    plain = network()
    net = CONVERSIONS[name](network())
    train(net, 2)
    net.eval()
    weights = {key: layer.weight.detach().clone() for key, layer in converted(net)}
    skipped = copy.deepcopy(net)
    latents = {key: latent_of(layer, "weight").detach().clone() for key, layer in converted(net)}
    baked = precision.remove(net)
    if name != "compact_binary":  # which has put PReLUs in
        assert list(baked.state_dict()) == list(plain.state_dict())
    for key, weight in weights.items():
        assert torch.equal(baked.get_submodule(key).weight, weight)
        assert type(baked.get_submodule(key)) is type(plain.get_submodule(key))
    for key, latent in latents.items():
        assert torch.equal(precision.remove(skipped, materialize=False).get_submodule(key).weight, latent)
    assert not list(converted(net))
    train(baked, 1)
    CONVERSIONS[name](baked)


@pytest.mark.parametrize("name", ["dorefa", "bnn", "fixed_point inexact", "xnor_net", "gradual"])
def test_a_compiled_model_computes_the_same(name) -> None:
    """Through every quantizer, noise included; the graph is traced by the eager backend."""
    eager, traced = CONVERSIONS[name](network()), CONVERSIONS[name](network())
    compiled = torch.compile(traced, backend="eager")
    x, y = data()
    for net in (eager, compiled):
        nn.functional.cross_entropy(net(x), y).backward()
    for one, two in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)


def test_all_numbers_of_a_fixed_point_model_are_on_their_grids() -> None:
    net = precision.fixed_point(network(), "Q3.8", activations="Q5.6", gradients="Q2.12")
    w, a, g = FixedPoint(3, 8), FixedPoint(5, 6), FixedPoint(2, 12)
    seen = []
    for _, layer in converted(net):
        layer.register_forward_hook(lambda _, __, y: seen.append(y))
        layer.register_full_backward_hook(lambda _, __, dy: None)
    train(net, 2)
    assert len(seen) == 8
    assert all(torch.equal(y, a.round(y)) for y in seen)
    for _, layer in converted(net):
        for name in ("weight", "bias"):
            latent = latent_of(layer, name)
            if latent is not None:
                assert torch.equal(latent, w.round(latent))
                assert torch.equal(latent.grad, g.round(latent.grad))
                assert latent.grad.any()


def test_exact_sums_are_rounded_once() -> None:
    """Products of 11-bit numbers, of which float32 loses some: the sum in integers, rounded once."""
    layer = nn.Linear(4000, 3, bias=False)
    net = precision.fixed_point(layer, "Q3.12", rounding="nearest", activations="Q9.12")
    x = FixedPoint(3, 12).round(torch.randn(5, 4000, generator=torch.Generator().manual_seed(1)))
    w = latent_of(net, "weight").detach()
    exact = (x * 4096).long() @ (w * 4096).long().T
    assert torch.equal(net(x).detach(), (exact.double() / 2**24 * 4096).round().float() / 4096)


def test_small_updates_survive_stochastic_rounding_only() -> None:
    """An update of a tenth of the spacing, fifty times."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        layer = nn.Linear(50, 50, bias=False)
        nn.init.zeros_(layer.weight)
        precision.fixed_point(layer, "Q4.8", rounding=rounding)
        weight = latent_of(layer, "weight")
        optimizer = torch.optim.SGD([weight], 0.1)
        for _ in range(50):
            weight.grad = torch.full_like(weight, -(2.0**-8))
            optimizer.step()
        moved[rounding] = float(weight.detach().mean() / 2.0**-8)
    assert moved["nearest"] == 0
    assert abs(moved["stochastic"] - 5) < 5 * (50 * 0.09) ** 0.5 / 50


def test_latent_weights_stay_within_one_whatever_the_optimizer() -> None:
    net = precision.bnn(network())
    optimizer = torch.optim.Adam(net.parameters(), 0.7)
    train(net, 3, optimizer=optimizer)
    for _, layer in converted(net):
        assert 0.9 < latent_of(layer, "weight").abs().max() <= 1


def test_a_model_of_another_rank_draws_other_noise_but_rests_on_the_same_grid_points() -> None:
    nets = [precision.fixed_point(network(), "Q3.6", rank=rank) for rank in (0, 1)]
    for (_, one), (_, two) in zip(converted(nets[0]), converted(nets[1]), strict=True):
        assert torch.equal(one.weight, two.weight)
    assert not torch.equal(*(net(data()[0]) for net in nets))


@pytest.mark.parametrize("update", ["next", "above"])
def test_no_gradient_that_is_used_has_crossed_a_quantized_activation(update, monkeypatch) -> None:
    """Every quantizer that is on spoils what crosses it: what is trained must not notice."""
    net = precision.gradual(network(), "Q3.3")
    monkeypatch.setattr(
        StraightThrough,
        "backward",
        staticmethod(lambda ctx, g: (torch.full_like(g, float("nan")), None, None)),
    )
    phases, trained = 0, set()
    for phase in precision.bottom_to_top(net, update):
        phases += 1
        x, y = data()
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        learning = {name for name, one in net.named_parameters() if one.requires_grad}
        assert learning == set(phase.trained)
        assert all(one.grad.isfinite().all() for one in net.parameters() if one.requires_grad)
        assert sum(layer.input_quantizer.on for _, layer in converted(net)) == phase.quantized == phases
        trained |= learning
    assert phases == 3
    assert {"3.weight", "4.weight", "7.weight", "10.bias"} <= trained
    assert not {"0.weight", "1.weight"} & trained
    assert all(one.requires_grad for one in net.parameters())
    nn.functional.cross_entropy(net(x), y).backward()  # all are on now: the spoiling is real
    assert not net[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("masked", [True, False])
def test_what_was_clamped_passes_a_gradient_only_without_the_mask(masked) -> None:
    layer = nn.Linear(3, 1, bias=False)
    precision.gradual(layer, "Q2.2", skip=(), masked=masked)
    x = torch.tensor([[0.3, -1.9, 7.0]], requires_grad=True)
    layer(x).sum().backward()
    skipped = torch.tensor([1.0, 1.0, 0.0 if masked else 1.0])
    assert torch.equal(x.grad[0], skipped * layer.weight[0])


def test_the_top_layers_learn_alone() -> None:
    net = precision.gradual(network(), "Q3.3")
    assert precision.top_layers(net).trained == ("10.weight", "10.bias")
    assert "7.weight" in precision.top_layers(net, 2).trained


def test_measures_of_the_compact_recipe_can_be_had_one_by_one() -> None:
    net = precision.compact_binary(network(), prelu=False, scale_last=False, binarizations=1)
    assert not any(isinstance(part, nn.PReLU) for part in net.modules())
    net = precision.compact_binary(network())
    assert sum(isinstance(part, nn.PReLU) for part in net.modules()) == 3
    assert hasattr(net[10].output_quantizer, "factor")
    w = torch.cat([latent_of(layer, "weight").flatten() for _, layer in converted(net)])
    expected = 0.5 * (1 - w.clamp(-1, 1) ** 2).sum()
    torch.testing.assert_close(precision.bipolar_penalty(net, 0.5), expected)
    groups = precision.slow_groups(net, 2.0, 0.1, 0.01)
    assert {group["lr"]: len(group["params"]) for group in groups} == {2.0: 13, 0.2: 3, 0.02: 1}
    everyone = {id(one) for one in net.parameters()}
    assert {id(one) for group in groups for one in group["params"]} == everyone


def test_magnitudes_that_a_layer_shares_run_off_at_the_common_rate_of_sgd() -> None:
    def trained(groups) -> tuple[float, float]:
        """The last losses, and the largest magnitude."""
        net = precision.ttq(network(), skip=())
        losses = train(net, 60, optimizer=torch.optim.SGD(groups(net), 0.1, momentum=0.9))
        magnitudes = [
            one for group in precision.slow_groups(net, 1.0, 1.0, 0.5)[1:] for one in group["params"]
        ]
        assert len(magnitudes) == 8
        return sum(losses[-4:]) / 4, max(one.detach().abs().item() for one in magnitudes)

    alike, off = trained(lambda net: net.parameters())
    slowed, near = trained(lambda net: precision.slow_groups(net, 0.1, slower=1.0))
    assert slowed < 0.5 * alike
    assert near < 1 < off


def test_shift_norms_and_adamax_use_powers_of_two_alone() -> None:
    net = precision.shift_norms(precision.bnn(bare(network())))
    assert sum(isinstance(part, precision.ShiftBatchNorm) for part in net.modules()) == 3
    losses = train(net, 60, optimizer=precision.ShiftAdaMax(net.parameters(), 2.0**-6))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    w = nn.Parameter(torch.tensor([0.0, 0.0, 0.0]))
    w.grad = torch.tensor([0.25, -4.0, 0.0])
    precision.ShiftAdaMax([w], 0.5, (0.0, 0.5)).step()
    assert w.tolist() == [-0.5, 0.5, 0.0]


def test_a_shift_norm_is_a_batch_norm_but_for_the_powers_of_two() -> None:
    norm, x = precision.ShiftBatchNorm(3), torch.randn(64, 3, 5)
    y = norm(x)
    for channel in range(3):
        c = (x - x.mean((0, 2), keepdim=True))[:, channel]
        v = (c * torch.sign(c) * 2 ** c.abs().log2().round()).mean()
        torch.testing.assert_close(y[:, channel], c * 2 ** (-0.5 * (v + 1e-5).log2()).round())


def test_the_summary_counts_bits_bytes_and_operations() -> None:
    found = precision.summary(precision.dorefa(network(), 1, 2, 6), torch.zeros(2, 1, 4, 4))
    first, second, third, _ = found.layers
    assert (first.bit_widths.weights, second.bit_widths.weights, second.bit_widths.activations) == (32, 1, 2)
    assert second.bytes == 4 * 6 * 9 / 8
    assert third.bytes == 96 * 12 / 8 + 4 * 12
    assert [one.operations for one in found.layers] == [2 * 16 * 4 * 9, 2 * 16 * 6 * 36, 2 * 96 * 12, 2 * 36]
    assert sum(found.share.values()) == pytest.approx(1)
    total = sum(one.operations for one in found.layers)
    assert found.share[1, 2] == (second.operations + third.operations) / total
    assert "1 x 2 bits" in str(found)
    assert found.float_bytes == 4 * sum(one.numel() for one in network().parameters())
    q = precision.summary(precision.fixed_point(network(), "Q4.4"))
    assert q.layers[0].bytes == 4 * 9 + 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: precision.dorefa(network(), 0), "1 to 32 bits"),
        (lambda: precision.dorefa(nn.ReLU()), "nothing to convert"),
        (lambda: precision.dorefa(network(), skip=("nosuch",)), "no layers"),
        (lambda: precision.dorefa(nn.Linear(2, 2)), "every layer is skipped"),
        (lambda: precision.bnn(precision.dorefa(network())), "converted already"),
        (lambda: precision.fixed_point(network(), "Q4.12", rounding="up"), "stochastic or nearest"),
        (lambda: precision.ttq(network(), 1.5), "share of the largest"),
        (lambda: precision.few_multiplications(network(), weights="five"), "ternary and binary"),
        (lambda: precision.few_multiplications(nn.Conv1d(1, 1, 1)), "Linear and Conv2d"),
        (lambda: precision.weighted_entropy(network(), 1), "2 to 8 bits"),
        (lambda: precision.compact_binary(network(), binarizations=0), "at least once"),
        (lambda: next(precision.bottom_to_top(network())), "gradual"),
        (lambda: precision.bipolar_penalty(network()), "compact_binary"),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong, said) -> None:
    with pytest.raises(DistcompError, match=said):
        wrong()


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(1, 1, 1))
    with pytest.raises(DistcompError):
        precision.few_multiplications(net)
    assert not list(converted(net))
