"""Drivers: their gradients are those of the papers' penalties, they end where they say, and they resume."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distcomp import DistcompError, precision, pruning, structured
from distcomp.files.container import compress, decompress
from distcomp.parametrize import chain, parameters
from distcomp.parametrize.links import applied
from distcomp.structured import SVD, Ternary
from distcomp.structured.early import pulled_back
from distcomp.structured.force import forces
from distcomp.structured.lc import nearest_description
from tests.structured import oracles


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
    return x, x[:, :6].argmax(1)


def trained(net: nn.Module, optimizer: Any, steps: int, start: int = 0) -> float:
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def gradients_with(make: Any, scale: float = 1.0) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """What a driver adds to the gradients of one iteration."""
    plain, driven = network(), network()
    driver = make(driven)
    for net in (plain, driven):
        nn.functional.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
        torch.optim.SGD(net.parameters(), 0.0).step()
    added = {
        name: other.grad - parameter.grad
        for (name, parameter), other in zip(plain.named_parameters(), driven.parameters(), strict=True)
    }
    return driven, added, driver


# ------------------------------------------------------------------------------------------------------- LC


def test_the_l_step_adds_the_penaltys_gradient() -> None:
    net, added, _ = gradients_with(
        lambda net: structured.lc(net, None, structured.of_rank(2), mu=0.5, names=["0.weight"])
    )
    weight = net[0].weight.detach().numpy()
    expected = 0.5 * (weight - oracles.svd(weight, 2))
    np.testing.assert_allclose(added["0.weight"].numpy(), expected, atol=1e-5)
    assert not added["2.weight"].any()


def test_a_c_step_is_the_papers() -> None:
    net = network()
    driver = structured.lc(net, None, structured.of_rank(2), mu=0.5, factor=3.0, every=2, names=["0.weight"])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    trained(net, optimizer, 2)
    weight = net[0].weight.detach().numpy()
    delta = oracles.svd(weight, 2)  # lambda was zero
    np.testing.assert_allclose(driver.targets["0.weight"].numpy(), delta, atol=1e-5)
    np.testing.assert_allclose(driver.lambdas["0.weight"].numpy(), -0.5 * (weight - delta), atol=1e-5)
    assert driver.mu == 1.5
    lambdas = driver.lambdas["0.weight"].numpy().copy()
    trained(net, optimizer, 2, start=2)
    weight = net[0].weight.detach().numpy()
    delta = oracles.svd(weight - lambdas / 1.5, 2)
    np.testing.assert_allclose(driver.targets["0.weight"].numpy(), delta, atol=1e-5)
    np.testing.assert_allclose(
        driver.lambdas["0.weight"].numpy(), lambdas - 1.5 * (weight - delta), atol=1e-5
    )


def test_the_constraint_closes_and_beats_compressing_at_once() -> None:
    two = structured.codebook(2)
    net = network()
    trained(net, torch.optim.SGD(net.parameters(), 0.5), 150)
    direct = structured.lc(copy.deepcopy(net), None, two).finish()
    driver = structured.lc(net, None, two, mu=0.02, factor=1.5, every=12)
    trained(net, torch.optim.SGD(net.parameters(), 0.1), 200, start=150)
    assert driver.gap < 0.05
    driver.finish()
    for layer in (net[0], net[2]):
        assert len(layer.weight.unique()) == 2
    x, y = batch(999)
    losses = [nn.functional.cross_entropy(one(x), y).item() for one in (net, direct)]
    assert losses[0] < losses[1]


COMPRESSIONS: dict[str, Any] = {
    "codebook": structured.codebook(4),
    "pruned": structured.pruned(0.2),
    "rank": structured.of_rank(3),
    "circulant": lambda weight: structured.BlockCirculant(tuple(weight.shape), 4),
    "hashed": lambda weight: structured.Hashed(tuple(weight.shape), 40, domain="space"),
    "ternary": Ternary.of,
    "quantizer": precision.iterative.Nearest(precision.iterative.FixedPoint.of("Q2.3")),
    "pruned and quantized": [structured.pruned(0.3), structured.codebook(4)],
    "low rank, quantized": [
        structured.of_rank(3),
        precision.iterative.Nearest(precision.iterative.FixedPoint.of("Q2.3")),
    ],
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_any_compression_drives_and_ends_as_a_parametrization(name) -> None:
    net = network()
    driver = structured.lc(net, None, COMPRESSIONS[name], every=3, mu=0.1)
    trained(net, torch.optim.SGD(net.parameters(), 0.1), 8)
    links, theta = nearest_description(driver.compressions["0.weight"], net[0].weight.detach())
    target = applied(links, theta)[0]
    driver.finish()
    assert len(chain(net, "0.weight")) == (2 if "," in name or " and " in name else 1)
    torch.testing.assert_close(net.eval()[0].weight.detach(), target, atol=1e-6, rtol=0)
    trained(net, torch.optim.SGD(net.parameters(), 0.1), 1)  # what is stored trains


def test_pruned_and_quantized_together_are_both() -> None:
    both = [structured.pruned(0.3), structured.codebook(4)]
    links, theta = nearest_description(both, network()[0].weight.detach())
    target = applied(links, theta)[0]
    assert [type(link).__name__ for link in links] == ["Codebook", "Mask"]
    assert float((target != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert 2 <= len(target[target != 0].unique()) <= 4


def test_the_nearest_ternary_weight_is_the_best_of_all_thresholds() -> None:
    weight = network()[0].weight.detach()
    link = Ternary.of(weight)
    error = float((link.decode(link.right_inverse(weight)) - weight).square().sum())
    w = weight.numpy().ravel()
    best = math.inf
    for threshold in np.abs(w):
        codes = np.sign(w) * (np.abs(w) >= threshold)
        scale = (w * codes).sum() / np.abs(codes).sum()
        best = min(best, np.square(w - scale * codes).sum())
    assert error == pytest.approx(best, rel=1e-5)


def test_lc_resumes_bit_for_bit() -> None:
    def run(stop: int | None) -> tuple[Tensor, float]:
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        driver = structured.lc(net, optimizer, structured.codebook(3), every=4, mu=0.1)
        if stop is not None:
            trained(net, optimizer, stop)
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), driver.state_dict()))
            driver.detach()
            net = network(7)
            optimizer = torch.optim.Adam(net.parameters(), 1e-2)
            driver = structured.lc(net, optimizer, structured.codebook(3), every=4, mu=0.1)
            for part, state in zip((net, optimizer, driver), saved, strict=True):
                part.load_state_dict(state)
        trained(net, optimizer, 20 - (stop or 0), start=stop or 0)
        return net[0].weight.detach().clone(), driver.gap

    whole, resumed = run(None), run(10)
    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]


# ---------------------------------------------------------------------------------------------- soft sharing


def test_the_prior_is_the_mixtures_likelihood() -> None:
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    prior = structured.GaussianMixturePrior(weights, 3, zero=0.7, floor=0.01)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.3, -0.2, 1.0]))
        prior.log_sigmas.copy_(torch.tensor([-2.0, -1.0, -0.5, -1.5]))
    shares = 0.3 * torch.softmax(prior.logits.detach(), 0).numpy()
    expected = oracles.mixture(
        weights.numpy(),
        np.concatenate([[0.0], prior.means.detach().numpy()]),
        np.exp([-2.0, -1.0, -0.5, -1.5]),
        np.concatenate([[0.7], shares]),
    )
    assert float(prior(weights).detach()) == pytest.approx(expected, rel=1e-5)


def test_no_component_collapses_on_a_weight() -> None:
    weights = torch.zeros(10)
    weights[0] = 1.0
    prior = structured.GaussianMixturePrior(weights, 2, zero=0.5, floor=0.1)
    with torch.no_grad():
        prior.log_sigmas.fill_(-50.0)
    assert math.isfinite(float(prior(weights).detach()))
    assert float(prior(weights).detach()) > -10 * math.log(1 / (0.1 * float(weights.std())))


def test_soft_sharing_gathers_weights_and_the_container_holds_them_exactly() -> None:
    net = network()
    trained(net, torch.optim.SGD(net.parameters(), 0.5), 100)
    driver = structured.soft_sharing(net, components=6, zero=0.8, strength=1e-3, rates=(5e-3, 3e-2))
    before = driver.entropy_bits()
    trained(net, torch.optim.Adam(net.parameters(), 2e-3), 150, start=100)
    assert driver.entropy_bits() < before - 0.3
    driver.finish()
    values = torch.cat([net[layer].weight.detach().flatten() for layer in (0, 2)]).unique()
    assert len(values) <= 7
    state = pruning.plain_state(net)
    again = decompress(compress(state, 5))
    assert all(torch.equal(again[key], state[key]) for key in state if key.endswith("weight"))
    assert [type(link).__name__ for link in chain(net, "0.weight")] == ["Codebook"]


def test_its_gradient_is_the_priors() -> None:
    net, added, driver = gradients_with(
        lambda net: structured.soft_sharing(net, components=3, zero=0.5, strength=0.01, names=["0.weight"])
    )
    flat = net[0].weight.detach().flatten().requires_grad_()
    before = copy.deepcopy(driver.prior)
    fresh = structured.GaussianMixturePrior(flat.detach(), 3, 0.5, 1e-2)
    (expected,) = torch.autograd.grad(0.01 * fresh(flat), flat)
    torch.testing.assert_close(added["0.weight"].flatten(), expected, atol=1e-6, rtol=1e-4)
    assert not torch.equal(before.means, fresh.means)  # the mixture has learnt


# --------------------------------------------------------------------------------------------------- forces


def test_forces_are_the_papers_and_the_gradient_carries_them() -> None:
    weight = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(forces(weight).numpy(), oracles.forces(weight.numpy()), atol=1e-10)
    net, added, _ = gradients_with(lambda net: structured.force_regularization(net, 0.4, names=["2.weight"]))
    expected = -0.4 / 6 * oracles.forces(net[2].weight.detach().double().numpy())
    np.testing.assert_allclose(added["2.weight"].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("law", ["l2", "l1"])
def test_forces_turn_filters_towards_each_other_and_change_no_length(law) -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    force = forces(weight, law)
    assert float((force * weight).sum(1).abs().max()) < 1e-10

    def spread(w: Tensor) -> float:
        return float(torch.linalg.svdvals(nn.functional.normalize(w, dim=1))[1:].square().sum())

    assert spread(weight + 1e-3 * force) < spread(weight)


# ------------------------------------------------------------------------------------- reconstruction, early


def test_reconstruction_brings_the_outputs_nearer_without_a_label() -> None:
    net = network()
    reference = copy.deepcopy(net)
    basis = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))

    def batch(seed: int) -> tuple[Tensor, None]:
        """Inputs of few directions, which the SVD of a weight knows nothing of."""
        return torch.randn(32, 4, generator=torch.Generator().manual_seed(seed)) @ basis, None

    x = batch(555)[0]
    layerwise = structured.low_rank(copy.deepcopy(net), 4, layers="0", kind="svd")
    together = structured.low_rank(copy.deepcopy(net), 4, layers="0", kind="svd")
    inputs = (batch(step)[0] for step in range(200))
    structured.reconstruct(together, reference, inputs, lambda theta: torch.optim.Adam(theta, 1e-2))
    structured.global_error_reconstruction(net, 4, [batch(0)[0], batch(1)[0]], layers="0")
    errors = [float((one(x) - reference(x)).detach().square().mean()) for one in (together, net, layerwise)]
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]
    assert isinstance(chain(net, "0.weight")[0], SVD)


def test_reconstruction_wants_the_same_outputs_and_some_input() -> None:
    with pytest.raises(DistcompError, match="the model gives"):
        structured.reconstruct(network(), nn.Linear(12, 3), [batch(0)[0]])
    with pytest.raises(DistcompError, match="there is no input"):
        structured.reconstruct(network(), network(), [])


def adam_like_dense(seed: int = 0) -> tuple[nn.Sequential, Any]:
    net = network(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    trained(net, optimizer, 5)
    return net, optimizer


def test_the_optimizers_momentum_is_pulled_back_as_gradients_are() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    trained(net, optimizer, 5)
    momentum = optimizer.state[net[0].weight]["momentum_buffer"].clone()
    structured.restructure(net, optimizer, lambda model: structured.circulant(model, 4, layers="0"))
    (c,) = parameters(net, "0.weight")
    pulled = np.zeros(tuple(c.shape))
    for i in range(24):
        for j in range(12):
            pulled[i // 4, j // 4, (i - j) % 4] += momentum[i, j]
    np.testing.assert_allclose(optimizer.state[c]["momentum_buffer"].numpy(), pulled, atol=1e-5)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
    before = c.detach().clone()
    trained(net, optimizer, 1, start=5)
    assert not torch.equal(before, c)


def test_squares_are_pulled_back_by_squares() -> None:
    net, optimizer = adam_like_dense()
    squares = optimizer.state[net[0].weight]["exp_avg_sq"].clone()
    structured.restructure(net, optimizer, lambda model: structured.circulant(model, 4, layers="0"))
    (c,) = parameters(net, "0.weight")
    expected = np.zeros(tuple(c.shape))
    for i in range(24):
        for j in range(12):
            expected[i // 4, j // 4, (i - j) % 4] += squares[i, j]  # each Jacobian entry is 0 or 1
    found = optimizer.state[c]["exp_avg_sq"].numpy()
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(expected.sum(), rel=0.2)  # drawn: right in the mean
    assert int(optimizer.state[c]["step"]) == 5


def test_pulling_back_is_the_transposed_jacobian() -> None:
    link, weight = SVD((4, 5), 2), torch.randn(4, 5, dtype=torch.float64)
    left, right = (t.requires_grad_() for t in link.right_inverse(weight))
    gradient = torch.randn(4, 5, dtype=torch.float64)
    for found, wanted in zip(
        pulled_back((link,), (left, right), gradient), (gradient @ right.T, left.T @ gradient), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_what_cannot_be_projected_is_refused_before_anything_changes() -> None:
    net = network()
    optimizer = torch.optim.Rprop(net.parameters(), 1e-3)
    trained(net, optimizer, 2)
    with pytest.raises(DistcompError, match=r"Rprop keeps 'prev' of 0\.weight, which has no projection"):
        structured.restructure(net, optimizer, lambda model: structured.circulant(model, 4))
    assert not chain(net, "0.weight")


# -------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net: structured.lc(net, None, structured.codebook(2), mu=0), "mu > 0"),
        (lambda net: structured.lc(net, None, structured.codebook(2), factor=0.5), "factor >= 1"),
        (lambda net: structured.codebook(0), "1 to 4096 values"),
        (lambda net: structured.pruned(0.0), r"lies in \(0, 1\]"),
        (lambda net: structured.soft_sharing(net, zero=1.0), "0 < zero < 1"),
        (lambda net: structured.force_regularization(net, -1.0), "strength of 0 or more"),
        (lambda net: structured.force_regularization(net, law="l3"), "a law of"),
        (lambda net: structured.sparse_convolution(net, 0.0), "strength above 0"),
        (lambda net: structured.lc(nn.ReLU(), None, structured.codebook(2)), "no linear layer"),
        (
            lambda net: structured.lc(structured.circulant(net, 4), None, structured.codebook(2)),
            "described by BlockCirculant already",
        ),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(call, words) -> None:
    with pytest.raises(DistcompError, match=words):
        call(network())


def test_a_driver_that_is_detached_adds_nothing() -> None:
    net = network()
    with structured.force_regularization(net, 10.0):
        pass
    plain = network()
    for one in (net, plain):
        trained(one, torch.optim.SGD(one.parameters(), 0.1), 2)
    assert torch.equal(net[0].weight, plain[0].weight)
