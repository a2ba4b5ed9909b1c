"""Every criterion against its paper in NumPy, while a model is trained."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp import DistcompError, pruning
from distcomp.pruning.magnitude import n_of_m, smallest_pruned
from distcomp.pruning.masks import keep_largest
from distcomp.schedule import Schedule
from tests.pruning import oracles
from tests.pruning.training import NAMES, network, sgd, train


def watched(pruner, model, optimizer, steps, expected, changed=lambda name, grown: None):
    """Train; after each step compare the masks with ``expected(step, weights, masks, gradients)``."""
    masks = {name: mask.numpy().copy() for name, mask in pruner.masks.items()}
    trace = []

    def after(step):
        weights = {name: weight.numpy().copy() for name, weight in pruner.weights.items()}
        gradients = {name: one.parameter.grad.numpy().copy() for name, one in pruner.pruned.items()}
        wanted = expected(step, weights, masks, gradients)
        pruner.settle()
        for name, mask in pruner.masks.items():
            np.testing.assert_array_equal(mask.numpy(), wanted.get(name, masks[name]), f"{step} {name}")
            changed(name, mask.numpy() & ~masks[name])
            masks[name] = mask.numpy().copy()
        trace.append({name: mask.copy() for name, mask in masks.items()})

    train(model, optimizer, steps, after=after)
    return trace


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5]), max_size=30),
    st.integers(0, 35),
)
def test_the_largest_live_and_ties_go_to_the_lower_index(values, count):
    array = np.array(values, np.float32)
    kept = keep_largest(torch.from_numpy(array), count)
    np.testing.assert_array_equal(kept.numpy(), oracles.largest(array, count))


def test_gradual_follows_the_cubic_curve_and_is_nested():
    model = network()
    optimizer = sgd(model)
    pruner = pruning.gradual(model, optimizer, 0.75, begin=2, end=20, every=3)

    def expected(step, weights, masks, gradients):
        if not (2 <= step <= 20 and ((step - 2) % 3 == 0 or step == 20)):
            return {}
        share = oracles.cubic(step, 2, 20, 0.75)
        return {
            name: oracles.largest(np.abs(weight), round((1 - share) * weight.size), masks[name])
            for name, weight in weights.items()
        }

    trace = watched(pruner, model, optimizer, 24, expected)
    for before, now in itertools.pairwise(trace):
        assert all((now[name] <= before[name]).all() for name in NAMES)
    assert all(share == pytest.approx(0.75) for share in pruner.sparsity.values())


def test_a_global_share_is_of_all_weights_together():
    weights = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([2.0, 1.0, 6.0])}
    ones = {name: torch.ones(3, dtype=torch.bool) for name in weights}
    masks = smallest_pruned(weights, ones, 0.5, "global")
    assert masks["a"].tolist() == [True, True, False]
    assert masks["b"].tolist() == [False, False, True]


def test_magnitude_by_quality_is_a_factor_of_the_living_weights_deviation():
    model = network()
    optimizer = sgd(model)
    pruner = pruning.magnitude(model, optimizer, {NAMES[0]: 1.0, NAMES[1]: 0.5}, steps=(3, 6), by="quality")

    def expected(step, weights, masks, gradients):
        if step not in (3, 6):
            return {}
        factor = {NAMES[0]: 1.0, NAMES[1]: 0.5}
        return {
            n: masks[n] & (np.abs(w) >= factor[n] * w[masks[n]].std().astype(np.float32))
            for n, w in weights.items()
        }

    trace = watched(pruner, model, optimizer, 9, expected)
    assert 0 < trace[-1][NAMES[0]].mean() < trace[4][NAMES[0]].mean() < 1


def test_magnitude_reaches_its_share_in_steps():
    model = network()
    pruner = pruning.magnitude(model, None, 0.91, steps=(1, 3))
    shares = []
    train(model, sgd(model), 5, after=lambda step: shares.append(pruner.settle() or 1 - pruner.density))
    assert shares[1] == pytest.approx(0.7, abs=0.01)
    assert shares[4] == pytest.approx(0.91, abs=0.01)


def test_surgery_prunes_and_splices_as_in_the_paper():
    model = network()
    optimizer = sgd(model, lr=0.5)
    pruner = pruning.dns(model, optimizer, 0.3, gamma=0.05, until=60, seed=3)
    first = {}

    def expected(step, weights, masks, gradients):
        due = [name for name in NAMES if pruner.criterion.due(step, name)]
        for name in due:
            first.setdefault(name, weights[name])
        return {name: oracles.surgery(weights[name], masks[name], 0.3, first[name]) for name in due}

    trace = watched(pruner, model, optimizer, 80, expected)
    spliced = sum(
        int((now[name] & ~before[name]).sum()) for before, now in itertools.pairwise(trace) for name in NAMES
    )
    assert spliced > 0
    assert all((trace[60][name] == trace[-1][name]).all() for name in NAMES)


def test_dead_weights_are_trained_by_the_gradient_of_the_masked_ones():
    model, plain = network(), network()
    pruner = pruning.dns(model, None, 0.3, until=1)
    train(model, sgd(model), 2)
    pruner.settle()
    before = {name: weight.clone() for name, weight in pruner.weights.items()}
    with torch.no_grad():
        for name, mask in pruner.masks.items():
            plain.get_parameter(name).copy_(before[name] * mask)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                plain.get_parameter(name).copy_(parameter)
    train(model, sgd(model), 1, start=7)
    train(plain, sgd(plain), 1, start=7)
    for name in NAMES:
        moved = pruner.weights[name] - before[name]
        assert (moved[~pruner.masks[name]] != 0).any()
        torch.testing.assert_close(moved, -0.2 * plain.get_parameter(name).grad)


def test_draws_become_rarer_and_are_each_layers_own():
    draws = pruning.dns(network(), None, gamma=0.1, power=1, until=5000).criterion.draws
    early = np.mean([draws(step, "w") for step in range(40)])
    late = np.mean([draws(step, "w") for step in range(1000, 2000)])
    assert early == pytest.approx(np.mean([1 / (1 + 0.1 * t) for t in range(40)]), abs=0.2)
    assert late == pytest.approx(np.mean([1 / (1 + 0.1 * t) for t in range(1000, 2000)]), abs=0.005)
    assert [draws(t, "w") for t in range(99)] != [draws(t, "v") for t in range(99)]
    assert not draws(5000, "w")


def test_rigl_drops_and_grows_as_in_the_paper():
    model = network()
    optimizer = sgd(model, momentum=0.9)
    pruner = pruning.rigl(model, optimizer, 0.8, every=4, until=30, fraction=0.5)
    count = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert count == {NAMES[0]: round(0.2 * 12 * 16), NAMES[1]: round(0.2 * 16 * 4)}
    grown = []

    def expected(step, weights, masks, gradients):
        if step == 0 or step >= 30 or step % 4:
            return {}
        return {
            name: oracles.rigged(weights[name], masks[name], gradients[name], 0.5, step, 30) for name in NAMES
        }

    def begins_at_zero(name, new):
        grown.append(new.sum())
        momentum = optimizer.state[pruner.pruned[name].parameter]["momentum_buffer"]
        assert (pruner.weights[name].numpy()[new] == 0).all()
        assert (momentum.numpy()[new] == 0).all()

    watched(pruner, model, optimizer, 40, expected, begins_at_zero)
    assert sum(grown) > 20
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == count


def test_dense_sparse_dense_comes_back_at_zero():
    model = network()
    optimizer = sgd(model, momentum=0.9)
    pruner = pruning.dsd(model, optimizer, 0.5, sparse_from=3, dense_from=9)
    shares, returned = [], {}

    def after(step):
        pruned = {name: ~mask.clone() for name, mask in pruner.masks.items()}
        pruner.settle()
        shares.append(1 - pruner.density)
        if step == 9:
            returned.update({name: pruner.weights[name][pruned[name]] for name in NAMES})

    train(model, optimizer, 14, after=after)
    assert shares == [0.0] * 3 + [0.5] * 6 + [0.0] * 5
    assert all((values == 0).all() and values.numel() > 20 for values in returned.values())
    assert all((weight != 0).all() for weight in pruner.weights.values())


@given(st.integers(0, 9), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]))
def test_n_of_m(seed, pattern):
    n, m = pattern
    weight = torch.randn(6, 2 * m, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    np.testing.assert_array_equal(n_of_m(weight, n, m).numpy(), oracles.n_of_m(weight.numpy(), n, m))


def test_n_of_m_leaves_rows_that_do_not_fit_dense_and_refuses_them_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.Linear(8, 3))
    pruner = pruning.nm(model, steps=(0,))
    assert list(pruner.pruned) == ["1.weight"]
    with pytest.raises(DistcompError, match=r"0\.weight are no multiple of 4"):
        pruning.nm(torch.nn.Sequential(torch.nn.Linear(10, 8)), names=["0.weight"])


def test_the_sensitivity_scan_prunes_one_layer_at_a_time_and_leaves_the_model_alone():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []

    def loss():
        found.append({n: float((model.get_parameter(n) == 0).float().mean()) for n in NAMES})
        return sum(found[-1].values())

    table = pruning.sensitivity(model, loss, shares=(0.25, 0.5))
    assert [one[NAMES[0]] for one in found] == [0.25, 0.5, 0.0, 0.0]
    assert [one[NAMES[1]] for one in found] == [0.0, 0.0, 0.25, 0.5]
    assert pruning.affordable(table, 0.3) == {NAMES[0]: 0.25, NAMES[1]: 0.25}
    assert pruning.affordable(table, 0.1) == {NAMES[0]: 0.0, NAMES[1]: 0.0}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_dropout_for_retraining():
    assert pruning.retraining_dropout(0.5, 100, 25) == 0.25


def test_the_cubic_schedule():
    curve = Schedule.parse("0 ^> 0.9 @ 100")
    assert curve(50) == pytest.approx(0.9 - 0.9 * 0.125)
    assert str(curve) == "0 ^> 0.9 @ 100"
    assert [curve(step) for step in (0, 100, 500)] == [0.0, 0.9, 0.9]
    text = pruning.gradual(network(), None, "0 ~> 0.5 @ 10", every=1).criterion.sparsity
    assert text(5) == 0.25


WRONG = [
    (lambda m: pruning.gradual(m, None, 1.2), "in \\[0, 1\\)"),
    (lambda m: pruning.gradual(m, None, 0.5, scope="model"), "'layer' or 'global'"),
    (lambda m: pruning.gradual(m, None, names=["3.weight"]), "no parameter '3.weight'"),
    (lambda m: pruning.magnitude(m, None, 1.5), "share of pruned weights"),
    (lambda m: pruning.magnitude(m, None, by="size"), "'share' or 'quality'"),
    (lambda m: pruning.magnitude(m, None, steps=(5, 3)), "must rise"),
    (lambda m: pruning.dsd(m, None, sparse_from=5, dense_from=5), "must come before"),
    (lambda m: pruning.dns(m, None, gamma=-1), "0 or more"),
    (lambda m: pruning.rigl(m, None), "needs the optimizer"),
    (lambda m: pruning.rigl(m, sgd(m), 1.0), "sparsity in"),
    (lambda m: pruning.nm(m, None, 4, 4), "0 < n < m"),
    (lambda m: pruning.gradual(torch.nn.ReLU(), None), "no linear layer or convolution"),
    (lambda m: [pruning.gradual(m, None), pruning.gradual(m, None)], "parametrization already"),
]


@pytest.mark.parametrize(("act", "sentence"), WRONG)
def test_what_cannot_be_is_refused(act, sentence):
    with pytest.raises(DistcompError, match=sentence):
        act(network())


def test_a_tied_weight_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(DistcompError, match="shared by several"):
        pruning.gradual(model, None)
