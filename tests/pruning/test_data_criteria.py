"""Criteria that look at examples: correlation, and what the loss asks for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distcomp import DistcompError, pruning
from distcomp.pruning.correlated import correlations
from tests.pruning import oracles
from tests.pruning.training import NAMES, batch, network, sgd, train


def test_correlations_of_linear_layers_and_convolutions():
    torch.manual_seed(0)
    x, linear = torch.randn(20, 6), nn.Linear(6, 4)
    x[:, 2] = 0.7
    found = correlations(linear, x, linear(x)).detach().numpy()
    assert (found[:, 2] == 0).all()
    others = [0, 1, 3, 4, 5]
    expected = oracles.correlations(x[:, others].numpy(), linear(x).detach().numpy())
    np.testing.assert_allclose(found[:, others], expected, atol=1e-5)
    maps, conv = torch.randn(12, 2, 5, 4), nn.Conv2d(2, 3, 3)
    found = correlations(conv, maps, conv(maps)).detach().numpy()
    expected = oracles.conv_correlations(maps.numpy(), conv(maps).detach().numpy(), 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_last_layer_goes_first():
    model = network()
    pruner = pruning.correlation(model, None, 0.5, inputs=batch(99)[0], begin=2, every=3)
    optimizer, seen = sgd(model), []
    for step in range(7):
        train(model, optimizer, 1, step)
        pruner.settle()
        seen.append([round(pruner.sparsity[name], 6) for name in NAMES])
    assert seen == [[0, 0]] * 2 + [[0, 0.5]] * 3 + [[0.5, 0.5]] * 2


def test_three_of_four_survivors_are_the_most_correlated():
    model, inputs = network(), torch.randn(50, 12, generator=torch.Generator().manual_seed(4))
    hidden = torch.tanh(model[0](inputs)).detach()
    scores = oracles.correlations(hidden.numpy(), model[2](hidden).detach().numpy())
    pruner = pruning.correlation(model, None, 0.5, inputs=inputs)
    model(inputs).sum().backward()
    pruner.settle()
    mask = pruner.masks["2.weight"].numpy()
    assert mask.sum() == 32
    assert (mask & oracles.largest(scores, 24)).sum() == 24
    assert not (mask == oracles.largest(scores, 32)).all()


@pytest.mark.parametrize(("balance", "at_once"), [(0.0, 1), (30.0, 1), (1.0, 2)])
def test_channels_are_selected_as_in_the_paper(balance, at_once):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3)).double()
    x, y = torch.randn(30, 9).double(), torch.randint(3, (30,))
    first, second = ([p.detach().numpy().copy() for p in layer.parameters()] for layer in model)
    pruner = pruning.dcp(model, None, 0.5, data=(x, y), names=["0.weight"], balance=balance, at_once=at_once)
    model.train()
    model(x).sum().backward()
    pruner.settle()
    active = pruner.masks["0.weight"]
    assert bool((active == active[0]).all())
    assert int(active[0].sum()) == 9 - int(0.5 * 9)
    if at_once == 1:
        expected = oracles.discriminating(x.numpy(), y.numpy(), first, second, balance, 5)
        assert active[0].nonzero().flatten().tolist() == expected
    assert model.training
    assert (model[0].weight[:, ~active[0]] == 0).all()
    assert pruner.weights["0.weight"].abs().min() > 0
    assert pruner.pruned["0.weight"].parameter.grad is not None


def test_channels_of_all_convolutions_but_the_first_and_one_layer_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 2), nn.Flatten()
    )
    x, y = torch.randn(10, 1, 6, 6), torch.randint(2, (10,))
    pruner = pruning.dcp(model, None, 0.5, data=(x, y), begin=1, every=2)
    seen = []
    for _ in range(5):
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.settle()
        seen.append([round(one, 6) for one in pruner.sparsity.values()])
    assert list(pruner.pruned) == ["2.weight", "4.weight"]
    assert seen == [[0, 0], [0.5, 0], [0.5, 0], [0.5, 0.5], [0.5, 0.5]]
    small = pruning.shrink(model)
    assert small.get_submodule("2").weight.shape == (3, 2, 3, 3)
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused():
    x = torch.randn(4, 12)
    for make, sentence in (
        (lambda: pruning.correlation(network(), None, 1.0, inputs=x), "in \\[0, 1\\)"),
        (lambda: pruning.correlation(nn.Conv2d(2, 2, 1, groups=2), None, inputs=x), "weight is not"),
        (lambda: pruning.dcp(network(), None, data=(x, x)), "no second convolution"),
        (lambda: pruning.dcp(network(), None, data=(x, x), every=0), "1 or more"),
        (lambda: pruning.dcp(network(), None, 1.0, data=(x, x)), "in \\[0, 1\\)"),
    ):
        with pytest.raises(DistcompError, match=sentence):
            make()
