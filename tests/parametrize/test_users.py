"""Quantizers, masks and shared codebooks over each other and over a structure, through their own calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distcomp import DistcompError, precision, pruning
from distcomp.parametrize import bits, chain, install, parameters, remove
from tests.parametrize.toys import LowRank, batch, network, train

W = "0.weight"


def low_rank() -> nn.Sequential:
    model = network()
    install(model, W, LowRank(3))
    return model


def sizes(model: nn.Module) -> int:
    return sum(part.numel() for part in parameters(model, W))


def kinds(model: nn.Module) -> list[str]:
    return [type(link).__name__ for link in chain(model, W)]


# ------------------------------------------------------------ three faults, before there was a chain


def test_restoring_a_quantized_structure_leaves_the_weight_its_shape() -> None:
    model = low_rank()
    before = model[0].weight.detach()
    precision.dorefa(model, 1, 32, 32, skip=())
    precision.remove(model, materialize=False)
    assert kinds(model) == ["LowRank"]
    assert torch.equal(model[0].weight, before)
    assert model(batch()[0]).shape == (16, 5)


def test_baking_a_quantized_structure_says_that_it_stores_more_numbers() -> None:
    model = precision.dorefa(low_rank(), 1, 32, 32, skip=()).eval()
    before, output = model[0].weight.detach(), model(batch()[0])
    with pytest.raises(
        DistcompError, match=r"LowRank .* cannot hold .* densify=True, which stores 288 numbers"
    ):
        precision.remove(model)
    assert torch.equal(model(batch()[0]), output)  # nothing has happened, in no layer
    assert sizes(model) == 108
    precision.remove(model, densify=True)
    assert kinds(model) == []
    assert sizes(model) == 288
    assert torch.equal(model[0].weight, before)


def test_sharing_over_a_structure_shares_what_it_stores() -> None:
    model = low_rank()
    pruning.share(model, bits=3)
    assert kinds(model) == ["Codebook", "LowRank"]
    (centroids,) = parameters(model, W)
    left, right = chain(model, W)[0](centroids)
    assert left.unique().numel() + right.unique().numel() <= 2 * 9
    assert torch.equal(model[0].weight, left @ right)
    losses = train(model, torch.optim.SGD(model.parameters(), 0.05), 12)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------- one over another


def test_what_is_pruned_stays_zero_under_one_bit() -> None:
    """Signs have no zero: the mask stands over them, whichever came first."""
    mask = torch.rand(24, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    first, second = network(), network()
    pruning.fixed(first, {W: mask})
    precision.bnn(first, skip=())
    precision.bnn(second, skip=())
    pruning.fixed(second, {W: mask})
    for model in (first, second):
        assert kinds(model) == ["BinaryWeight", "Mask"]
        assert torch.equal(model[0].weight != 0, mask)
    assert torch.equal(first[0].weight, second[0].weight)
    with pytest.raises(DistcompError, match="packed words hold no zeros"):
        precision.pack(first)
    with pytest.raises(DistcompError, match=r"BinaryWeight \(precision\) cannot hold exactly"):
        pruning.materialize(first)
    pruning.materialize(first, densify=True)
    assert torch.equal(first[0].weight != 0, mask)
    assert list(precision.remove(first).state_dict()) == list(network().state_dict())


def test_a_pruner_goes_on_over_a_quantizer() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = pruning.magnitude(model, optimizer, 0.5, names=[W], steps=(1,))
    precision.gradual(model, None, "Q2.4", skip=("2",))
    train(model, optimizer, 3)
    pruner.settle()
    assert (model[0].weight == 0).float().mean() >= 0.5
    assert pruner.density == pytest.approx(0.5)
    kept = copy.deepcopy(model)
    precision.remove(model, materialize=False)
    assert kinds(model) == ["Mask"]
    pruning.materialize(model)
    latents = model[0].weight.detach()
    assert torch.equal(torch.round(latents * 16) / 16, kept[0].weight)


def test_layers_whose_class_is_swapped_keep_their_masks() -> None:
    mask = torch.rand(24, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    model = network()
    pruning.fixed(model, {W: mask})
    precision.few_multiplications(model)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    precision.remove(model, materialize=False)
    assert torch.equal(model[0].weight != 0, mask)
    pruning.materialize(model)
    assert [type(part) for part in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_shared_values_are_quantized_and_their_zeros_stay() -> None:
    mask = torch.rand(24, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    model = network()
    precision.gradual(model, None, "Q2.4", skip=("2",))
    pruning.fixed(model, {W: mask})
    pruning.share(model, bits=2)
    assert kinds(model) == ["Codebook", "Nearest", "Mask"]
    weight = model[0].weight.detach()
    assert weight.unique().numel() <= 5
    assert not weight[~mask].any()
    assert torch.equal(weight, torch.round(weight * 16) / 16)
    with pytest.raises(DistcompError, match="shares its values already"):
        pruning.share(model)
    remove(model, W, "sharing", densify=True)
    assert torch.equal(model[0].weight, weight)


def test_laws_at_rest_hold_for_shared_weights_and_are_refused_for_factors() -> None:
    model = network()
    pruning.share(model, bits=2)
    precision.fixed_point(model, "Q2.4", skip=("2",))
    train(model, torch.optim.SGD(model.parameters(), 0.5), 2)
    for part in parameters(model, W):
        assert torch.equal(part, torch.round(part * 16) / 16)
    with pytest.raises(DistcompError, match="the weight of 0 is stored as LowRank"):
        precision.fixed_point(low_rank(), "Q2.4")
    late = precision.fixed_point(network(), "Q2.4")
    install(late, W, LowRank(3))
    with pytest.raises(DistcompError, match="stored as LowRank"):
        train(late, torch.optim.SGD(late.parameters(), 0.5), 1)
    clipped = precision.binary_connect(low_rank())
    train(clipped, torch.optim.SGD(clipped.parameters(), 0.5), 1)


def test_pruners_refuse_what_is_not_stored_weight_by_weight() -> None:
    model = low_rank()
    with pytest.raises(DistcompError, match=r"a parametrization already, LowRank \(structured\)"):
        pruning.gradual(model, None, names=[W])
    pruning.share(other := network(), bits=2)
    with pytest.raises(DistcompError, match=r"already, Codebook \(sharing\)"):
        pruning.gradual(other, None, names=[W])


def test_frequencies_are_transformed_before_they_are_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    before = model[0].weight.detach().clone()
    pruner = pruning.frequency(model)
    pruner.pruned[W].mask[..., 2, 2] = False
    precision.gradual(model, None, "Q2.4", skip=())
    assert kinds(model) == ["FrequencyMask", "Nearest"]
    weight = model[0].weight.detach()
    assert torch.equal(weight, torch.round(weight * 16) / 16)
    precision.remove(model, materialize=False)
    remove(model, W, "pruning", materialize=False)
    torch.testing.assert_close(model[0].weight.detach(), before)  # kernels, not coefficients


def test_the_summary_and_the_packed_checkpoint_see_the_chain() -> None:
    model = precision.dorefa(low_rank(), 4, 32, 32, skip=("2",))
    row = precision.summary(model, batch()[0]).layers[0]
    assert row.numel == 108 + 24
    assert row.bytes == 288 * 4 / 8 + 4 * 24
    assert row.operations == 16 * 288
    assert precision.summary(model).other_bytes == 0
    model.eval()
    state = precision.unpacked_state_dict(precision.packed_state_dict(model))
    plain = network()
    plain.load_state_dict(state)
    assert torch.equal(plain(batch()[0]), model(batch()[0]))
    assert kinds(model) == ["LowRank", "DorefaWeight"]


def test_bits_of_a_quantizer_count_its_scales_and_noise_is_not_stored() -> None:
    expected = {
        "dorefa": (lambda net: precision.dorefa(net, 1, 32, 32, skip=()), 288 + 32),
        "dorefa 3": (lambda net: precision.dorefa(net, 3, 32, 32, skip=()), 3 * 288),
        "binary": (lambda net: precision.binary_connect(net), 288),
        "binary, stochastic": (lambda net: precision.binary_connect(net, stochastic=True), 32 * 288),
        "xnor": (lambda net: precision.xnor_net(net, skip=()), 288 + 32 * 24),
        "ttq": (lambda net: precision.ttq(net, skip=()), 2 * 288 + 64),
        "few": (lambda net: precision.few_multiplications(net), 32 * 288),
        "entropy": (lambda net: precision.weighted_entropy(net, 2, skip=()), 2 * 288 + 4 * 32),
        "fixed": (lambda net: precision.fixed_point(net, "Q4.4"), 8 * 288),
    }
    assert {name: bits(make(network()), W) for name, (make, _) in expected.items()} == {
        name: count for name, (_, count) in expected.items()
    }
