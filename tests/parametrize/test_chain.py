"""Chains: where links stand, what is left when one goes, what is refused, and that copies are copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils.parametrizations import weight_norm

from distcomp import DistcompError
from distcomp.parametrize import bits, chain, install, latent, materialize, parameters, remove
from tests.parametrize.toys import Halves, Keep, LowRank, Signs, batch, network, train

W = "0.weight"


def kinds(model: nn.Module) -> list[type]:
    return [type(link) for link in chain(model, W)]


def a_mask(model: nn.Module, seed: int = 1) -> Keep:
    return Keep(torch.rand(24, 12, generator=torch.Generator().manual_seed(seed)) < 0.5)


def stacked() -> nn.Sequential:
    """A pruned, rounded low-rank layer; in evaluation."""
    model = network()
    for link in (a_mask(model), Halves(), LowRank(3)):
        install(model, W, link)
    return model.eval()


def test_links_stand_in_their_order_whenever_they_come() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    weight = model[0].weight
    install(model, W, a_mask(model))
    install(model, W, Halves())
    assert parameters(model, W) == (weight,)  # the very object: optimizers and DDP go on with it
    install(model, W, LowRank(3))
    assert kinds(model) == [LowRank, Halves, Keep]
    assert [tuple(part.shape) for part in parameters(model, W)] == [(24, 3), (3, 12)]
    left, right = parameters(model, W)
    torch.testing.assert_close(model[0].weight, torch.round(2 * (left @ right)) / 2 * chain(model, W)[2].mask)
    assert latent(model, W, "precision").grad_fn is not None
    assert torch.equal(latent(model, W, "structured"), left)
    materialize(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is nn.Linear


def test_a_structure_is_the_nearest_to_the_weight_it_found() -> None:
    model = network()
    u, s, v = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    install(model, W, LowRank(3))
    torch.testing.assert_close(model[0].weight, (u[:, :3] * s[:3]) @ v[:3])


@pytest.mark.parametrize("materialize", [True, False])
def test_a_structure_goes_only_where_it_is_asked_to_densify(materialize) -> None:
    model = stacked()
    before, state = model[0].weight.detach(), copy.deepcopy(model.state_dict())
    with pytest.raises(DistcompError, match="it stores 288 numbers, not 108; pass densify=True"):
        remove(model, W, "structured", materialize=materialize)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    remove(model, W, "structured", materialize=materialize, densify=True)
    assert kinds(model) == [Halves, Keep]
    assert parameters(model, W)[0].shape == (24, 12)
    assert torch.equal(model[0].weight, before)  # what lay above it stayed


def test_an_outer_link_that_is_baked_needs_a_place_that_holds_the_weight() -> None:
    model = stacked()
    before = model[0].weight.detach()
    with pytest.raises(
        DistcompError, match=r"LowRank \(structured\) cannot hold exactly .* stores 288 numbers"
    ):
        remove(model, W, "precision")
    assert torch.equal(model[0].weight, before)
    remove(model, W, "precision", densify=True)
    assert kinds(model) == [Keep]
    assert torch.equal(model[0].weight, before)


def test_an_outer_link_that_is_restored_leaves_what_is_stored_alone() -> None:
    model = stacked()
    theta = parameters(model, W)
    values = [part.detach().clone() for part in theta]
    remove(model, W, "precision", materialize=False)
    assert kinds(model) == [LowRank, Keep]
    assert all(one is two for one, two in zip(parameters(model, W), theta, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(theta, values, strict=True))
    torch.testing.assert_close(model[0].weight, values[0] @ values[1] * chain(model, W)[1].mask)


def test_zeros_are_baked_into_what_can_hold_them_and_into_nothing_else() -> None:
    for quantizer, holds in ((Halves(), True), (Signs(), False)):
        model = network()
        install(model, W, quantizer)
        install(model, W, a_mask(model))
        before = model[0].weight.detach()
        if holds:
            remove(model, W, "pruning")
            assert kinds(model) == [type(quantizer)]
        else:
            with pytest.raises(DistcompError, match=r"Signs \(precision\) cannot hold exactly"):
                remove(model, W, "pruning")
            remove(model, W, "pruning", densify=True)
            assert kinds(model) == []
        assert torch.equal(model[0].weight, before)


def test_removed_by_name_by_object_or_all_at_once() -> None:
    model = stacked()
    remove(model, W, chain(model, W)[1], materialize=False)
    assert kinds(model) == [LowRank, Keep]
    remove(model, W, densify=True)
    assert kinds(model) == []
    with pytest.raises(DistcompError, match="no parametrization of 'pruning' to remove; there is: nothing"):
        remove(model, W, "pruning")


def test_a_copy_gains_and_loses_links_and_the_original_does_not() -> None:
    model = stacked()
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    x, _ = batch()
    before = model(x)
    install(twin, "0.bias", Halves())
    materialize(other)
    assert torch.equal(model(x), before)
    assert torch.equal(other(x), before)
    assert isinstance(model[0].bias, nn.Parameter)
    install(model, "0.bias", Halves())
    materialize(model)
    assert torch.equal(twin(x), model(x))
    with pytest.raises(DistcompError, match="install the same parametrizations"):
        twin.load_state_dict(stacked().state_dict())  # the copy checks for itself


def test_state_dicts_go_into_the_same_chain_and_no_other() -> None:
    model, other = stacked(), stacked()
    train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x, _ = batch()
    assert torch.equal(model(x), other(x))
    with pytest.raises(
        DistcompError, match=r"0.weight is described by LowRank \(structured\), .* has no parametr"
    ):
        other.load_state_dict(network().state_dict())
    remove(other, W, "pruning", materialize=False)
    with pytest.raises(DistcompError, match=r"holds .*2.mask.* of it; install the same"):
        other.load_state_dict(model.state_dict())
    assert torch.equal(parameters(other, W)[0], parameters(model, W)[0])


def test_bits_are_those_of_parameters_and_of_what_describes_them() -> None:
    model = network()
    assert bits(model) == 32 * (288 + 24 + 120 + 5)
    install(model, W, LowRank(3))
    assert bits(model, W) == 32 * 108
    assert bits(model) == 32 * (108 + 24 + 120 + 5)
    assert bits(model, "2.weight") == 32 * 120


def test_another_tools_parametrization_is_a_link_like_others() -> None:
    model = network()
    weight_norm(model[0])
    before = model[0].weight.detach()
    install(model, W, a_mask(model))
    mask = chain(model, W)[1].mask
    torch.testing.assert_close(model[0].weight, before * mask)
    with pytest.raises(DistcompError, match=r"_WeightNorm \(not of distcomp\); remove that"):
        install(model, W, LowRank(3))
    remove(model, W, "pruning", materialize=False)
    assert torch_parametrize.is_parametrized(model[0], "weight")
    torch.testing.assert_close(model[0].weight, before)


def test_frozen_tensors_stay_frozen() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    install(model, W, LowRank(2))
    assert not any(part.requires_grad for part in parameters(model, W))
    materialize(model)
    assert not model[0].weight.requires_grad


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class Wide(Halves):
    def decode(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[:, :-1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: install(network(), "3.weight", Halves()), "no parameter '3.weight'; there are: 0.weight"),
        (lambda: install(tied(), W, Halves()), "shared by several layers"),
        (lambda: install(stacked(), W, LowRank(2)), r"described by LowRank \(structured\); remove that"),
        (lambda: install(network(), W, Wide()), r"decodes 0.weight to \(24, 11\) .* not \(24, 12\)"),
    ],
)
def test_what_cannot_be_is_refused_in_words(wrong, said) -> None:
    with pytest.raises(DistcompError, match=said):
        wrong()
