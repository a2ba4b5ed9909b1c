"""Groups go to zero exactly, by the proximal operator; kernels lose frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distcomp import DistcompError, pruning
from distcomp.pruning.frequency import Bands, FrequencyMask, dct_basis
from distcomp.pruning.groups import block_shrink
from tests.pruning import oracles
from tests.pruning.training import NAMES, network, sgd, train

WEIGHT = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(2))
GROUPS = {
    "filters": [(f,) for f in range(5)],
    "channels": [(slice(None), c) for c in range(4)],
    "shapes": [(slice(None), c, m, k) for c in range(4) for m in range(3) for k in range(3)],
    "depth": [(slice(None),)],
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_proximal_operator(kind, weighted):
    group = WEIGHT.numpy()[GROUPS[kind][0]]
    threshold = float(np.linalg.norm(group)) / (group.size**0.5 if weighted else 1.0)
    expected = WEIGHT.numpy().copy()
    for where in GROUPS[kind]:
        bound = threshold * (expected[where].size ** 0.5 if weighted else 1.0)
        expected[where] = oracles.block_shrunk(expected[where], bound * (1 + 1e-6))
    found = block_shrink(WEIGHT, kind, threshold * (1 + 1e-6), weighted).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found[GROUPS[kind][0]] == 0).all()


def test_elements_alone_are_soft_thresholded():
    bias = torch.tensor([0.5, -0.2, 0.1, -3.0])
    np.testing.assert_allclose(block_shrink(bias, "channels", 0.2, True), oracles.soft(bias.numpy(), 0.2))


@pytest.mark.parametrize("sparse", [False, True])
def test_group_lasso_takes_the_proximal_step_after_each_step_of_sgd(sparse):
    model, plain = network(), network()
    optimizer, twin = sgd(model), sgd(plain)
    pruner = pruning.group_lasso(model, optimizer, 0.05, until=10, sparse=sparse)
    assert set(pruner.pruned) == {*NAMES, "0.bias", "2.bias"}
    for step in range(4):
        train(model, optimizer, 1, step)
        train(plain, twin, 1, step)
        for parameter in plain.parameters():
            value = parameter.detach().numpy()
            value[...] = oracles.soft(value, 0.2 * 0.05) if sparse else value
            if value.ndim == 1:
                value[...] = oracles.soft(value, 0.2 * 0.05)
                continue
            for column in range(value.shape[1]):
                value[:, column] = oracles.block_shrunk(value[:, column], 0.2 * 0.05 * value.shape[0] ** 0.5)
        for name in pruner.pruned:
            torch.testing.assert_close(pruner.weights[name], plain.get_parameter(name).detach())


def test_zeros_are_exact_whole_columns_and_stay():
    model = network()
    optimizer = sgd(model)
    pruner = pruning.ssl(model, optimizer, until=40, channels=0.1)
    train(model, optimizer, 41)
    assert pruner.density == 1
    train(model, optimizer, 30, start=41)
    mask = pruner.masks[NAMES[0]]
    pruned = ~mask.any(0)
    assert 0 < int(pruned.sum()) < mask.shape[1]
    assert bool(mask[:, ~pruned].all())
    assert (model[0].weight[:, pruned] == 0).all()


def test_strengths_are_checked():
    model = network()
    for settings in ({}, {"filters": -1.0}):
        with pytest.raises(DistcompError, match="0 or more"):
            pruning.ssl(model, sgd(model), until=5, **settings)


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_the_transform(size):
    np.testing.assert_allclose(dct_basis(size).numpy(), oracles.dct_matrix(size), atol=1e-12)
    np.testing.assert_allclose(dct_basis(size) @ dct_basis(size).T, np.eye(size), atol=1e-12)


def test_a_frequency_mask_trains_coefficients_and_computes_with_kernels():
    torch.manual_seed(0)
    model, plain = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    plain.load_state_dict(model.state_dict())
    pruner = pruning.frequency(model, None, until=0)
    basis = oracles.dct_matrix(3)
    coefficients = np.einsum("ki,fcij,lj->fckl", basis, plain.weight.detach().numpy(), basis)
    np.testing.assert_allclose(pruner.weights["weight"].numpy(), coefficients, atol=1e-6)
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        one(torch.ones(1, 2, 5, 5)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-4, atol=1e-6)
    pruner.pruned["weight"].mask[:, :, 1:, 1:] = False
    kept = np.einsum("ki,fcij,lj->fckl", basis, plain.weight.detach().numpy(), basis)
    kept[:, :, 1:, 1:] = 0
    expected = np.einsum("ki,fckl,lj->fcij", basis, kept, basis)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, atol=1e-5)
    pruning.materialize(model)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, atol=1e-5)


def test_high_bands_have_higher_thresholds_and_the_law_is_an_option():
    model = nn.Conv2d(3, 8, 3)
    for law in ("rising", "linear", "flat"):
        factors = Bands(law).factors(3, 3)
        assert bool((factors[1:] >= factors[:-1]).all())
        assert factors[2, 2] == 1.5
    pruner = pruning.frequency(model, None, -0.2, until=1)
    assert isinstance(pruner.pruned["weight"].parametrization, FrequencyMask)
    weights = pruner.weights["weight"].numpy().copy()
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    pruner.settle()
    base = max(np.abs(weights).mean() - 0.2 * np.abs(weights).std(), 0)
    bounds = base * Bands().factors(3, 3).numpy()
    np.testing.assert_array_equal(pruner.masks["weight"].numpy(), np.abs(weights) > 0.9 * bounds)
    with pytest.raises(DistcompError, match="no 2-D convolution"):
        pruning.frequency(network(), None, names=["0.weight"])
