"""Pruned weights are not sent, nothing is lost, and every method works on the active ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import distcomp
from distcomp import DistcompError, pruning
from distcomp.attaching.masks import pruners_of
from distcomp.attaching.slices import slices_of
from distcomp.compressors import Quantize
from distcomp.layout import Layout
from distcomp.methods import METHODS, AllReduceMean, ErrorFeedback, from_compressor
from distcomp.payload import body_bytes
from distcomp.pruning.wire import Support
from tests.buffers import alike, draw, tensors
from tests.lockstep import converse

SPECS = [name for name, entry in METHODS.items() if entry.kind == "gradient" and not entry.control]


def pruned(density=0.3, seed=0):
    """A net with random fixed masks, and the layout of its gradients."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
    masks = {name: torch.rand(model.get_parameter(name).shape) < density for name in ("0.weight", "2.weight")}
    pruner = pruning.fixed(model, masks)
    slices = slices_of(model)
    return pruner, Layout(tuple(slices[id(parameter)] for parameter in model.parameters()))


def active_in(pruner, layout):
    return pruner.snapshot().active(layout, dense=False)


def dead_in(pruner, layout):
    active = active_in(pruner, layout)
    return active.spread(torch.ones(active.layout.numel)) == 0


def seen(pruner):
    """What the training loop hands over in a step."""
    return {pruner.name: pruner.snapshot()}


def test_support_sends_living_values_and_no_indices():
    pruner, layout = pruned()
    x = draw(1, layout)[0]
    support = Support(pruner.snapshot())
    count = sum(int(mask.sum()) for mask in pruner.masks.values()) + 32 + 10
    payload = support.encode(x, layout, None)
    assert body_bytes(support.parts(layout)) == 4 * count == payload["values"].numel() * 4
    expected = x.clone().numpy()
    at = 0
    for param in layout.slices:
        name = param.name.replace("parametrizations.", "").replace(".original", "")
        if name in pruner.masks:
            expected[at : at + param.numel] *= pruner.masks[name].numpy().ravel()
        at += param.numel
    np.testing.assert_array_equal(support.decode(payload, layout).numpy(), expected)


def test_masked_identity_is_support_on_an_all_reduce():
    pruner, layout = pruned()
    xs = draw(3, layout)
    masked = distcomp.masked(pruner, from_compressor(distcomp.compressors.Identity()))
    lifted = AllReduceMean(Support(pruner.snapshot()))
    one = converse(masked, xs, [masked.init(layout)] * 3, layout)
    two = converse(lifted, xs, [lifted.init(layout)] * 3, layout)
    assert torch.equal(one.estimate, two.estimate)
    assert masked.payload_bytes(layout, 3, 0) == lifted.payload_bytes(layout, 3, 0)


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_sends_less_and_keeps_its_law(spec):
    pruner, layout = pruned()
    inner = distcomp.parse(spec)
    method = distcomp.masked(pruner, inner)
    inactive = dead_in(pruner, layout)
    states = [method.init(layout) for _ in range(3)]
    for step in range(4):
        xs = draw(3, layout, seed=step)
        round_ = converse(method, xs, states, layout, step)
        states = round_.states
        assert (round_.estimate[inactive] == 0).all()
        total = torch.stack(round_.contributions()).double().sum(0)
        torch.testing.assert_close(total, 3 * round_.estimate.double(), rtol=1e-3, atol=2e-2)
        planned = method.payload_bytes(layout, 3, step)
        assert sum(round_.sent_bytes) / 3 <= 1.05 * planned + 300


@pytest.mark.parametrize("spec", SPECS)
def test_with_all_alive_it_is_the_method_itself(spec):
    pruner, layout = pruned(density=1.1)
    inner = distcomp.parse(spec)
    method = distcomp.masked(pruner, inner)
    states, others = ([one.init(layout) for _ in range(2)] for one in (method, inner))
    for step in range(3):
        xs = draw(2, layout, seed=step)
        mine, its = (converse(m, xs, s, layout, step) for m, s in ((method, states), (inner, others)))
        states, others = mine.states, its.states
        assert torch.equal(mine.estimate, its.estimate)
        assert all(alike(state["inner"], other) for state, other in zip(states, others, strict=True))


class Surgeon(pruning.Criterion):
    """Masks drawn anew every third step, while pruned weights are trained, too."""

    wants_dense = keeps_dense_grad = True
    restarts = False

    def __repr__(self):
        return "Surgeon()"

    def due(self, step, name):
        return step % 3 == 2

    def decide(self, view):
        return {
            name: torch.rand(view.masks[name].shape, generator=view.key.fold(name).generator()) < 0.4
            for name in view.due
        }


def operated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
    pruner = pruning.Pruner(model, None, Surgeon())
    slices = slices_of(model)
    return model, pruner, Layout(tuple(slices[id(parameter)] for parameter in model.parameters()))


def iterate(model):
    model(torch.ones(1, 24)).sum().backward()


def residual_of(state, path):
    return sum(leaf.double().sum() for name, leaf in tensors(state).items() if name.endswith(path))


@pytest.mark.parametrize("residuals", ["keep", "drop"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_came_in_is_what_was_sent_held_owed_and_dropped(residuals, size):
    model, pruner, layout = operated()
    inner = ErrorFeedback(from_compressor(Quantize(bits=2, rounding="nearest")))
    method = distcomp.masked(pruner, inner, residuals)
    states = [method.init(layout) for _ in range(size)]
    came = sent = torch.zeros(layout.numel, dtype=torch.float64)
    dense_steps = 0
    for step in range(11):
        xs = draw(size, layout, seed=step)
        dense = pruner.needs_dense(step, "0.weight")
        round_ = converse(method, xs, states, layout, step, seen(pruner))
        states = round_.states
        came = came + torch.stack(xs).double().sum(0)
        sent = sent + size * round_.estimate.double()
        if dense:
            dense_steps += 1
            assert all((state["held"].data == 0).all() for state in states)
        iterate(model)
        pruner.settle()
    kinds = ["held", "residual"] + (["dropped"] if residuals == "drop" else [])
    residual = sum(
        leaf.double().sum()
        for state in states
        for name, leaf in tensors(state).items()
        if name.split("/")[-1] in kinds
    )
    assert dense_steps == 3
    assert (residual.abs() > 1) & (sent.abs().sum() > 1)
    torch.testing.assert_close(came.sum(), sent.sum() + residual, rtol=1e-5, atol=1e-3)
    if residuals == "drop":
        assert any((state["dropped"].data != 0).any() for state in states)


def test_a_residual_waits_until_its_weight_lives_again():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    pruner = pruning.fixed(model, {"0.weight": torch.ones(2, 4)})
    layout = Layout((slices_of(model)[id(next(model.parameters()))],))
    method = distcomp.masked(pruner, ErrorFeedback(from_compressor(Quantize(bits=1))))
    x = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    first = converse(method, [x], [method.init(layout)], layout)
    residual = tensors(first.states[0])["0.parametrizations.weight.original/inner/residual"].clone()
    assert (residual != 0).any()
    pruner.pruned["0.weight"].mask[:, 2:] = False
    second = converse(method, [x], first.states, layout, 1, seen(pruner))
    kept = tensors(second.states[0])["0.parametrizations.weight.original/inner/residual"].view(2, 4)
    assert torch.equal(kept[:, 2:], residual.view(2, 4)[:, 2:])
    assert not torch.equal(kept[:, :2], residual.view(2, 4)[:, :2])


def test_structured_survivors_stay_matrices():
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    conv = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    conv[::2, 1:4] = True
    rows = torch.zeros(10, 32, dtype=torch.bool)
    rows[:7] = True
    pruner = pruning.fixed(model, {"0.weight": conv, "2.weight": rows})
    slices = slices_of(model)
    layout = Layout(tuple(slices[id(parameter)] for parameter in model.parameters()))
    shapes = {one.name: one.shape for one in active_in(pruner, layout).layout.slices}
    assert shapes["0.parametrizations.weight.original"] == (4, 3, 3, 3)
    assert shapes["2.parametrizations.weight.original"] == (7, 32)
    rank = distcomp.masked(pruner, "powersgd:rank=1")
    plain = distcomp.masked(pruner, "identity")
    assert rank.payload_bytes(layout, 2, 0) < plain.payload_bytes(layout, 2, 0) / 2
    state = rank.init(layout)
    warm = [leaf for leaf in tensors(state).values() if leaf.dim() == 2]
    assert {tuple(leaf.shape) for leaf in warm} == {(1, 27), (1, 32)}


def test_a_warm_start_of_another_shape_begins_anew():
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    pruner = pruning.fixed(model, {"0.weight": torch.ones(16, 32)})
    layout = Layout((slices_of(model)[id(next(model.parameters()))],))
    method = distcomp.masked(pruner, "powersgd:rank=2")
    round_ = converse(method, draw(2, layout), [method.init(layout)] * 2, layout)
    pruner.pruned["0.weight"].mask[:, 20:] = False
    xs = draw(2, layout, seed=1)
    after = converse(method, xs, round_.states, layout, 1, seen(pruner))
    inactive = dead_in(pruner, layout)
    assert (after.estimate[inactive] == 0).all()
    assert torch.isfinite(after.estimate).all()
    fresh = method.inner.init(active_in(pruner, layout).layout)
    kept = {tuple(leaf.shape) for leaf in tensors(after.states[0]).values()}
    assert kept >= {tuple(leaf.shape) for leaf in tensors(fresh).values() if leaf.dim() == 2}


def test_pruners_are_found_within_methods():
    pruner, _ = pruned()
    inside = distcomp.masked(pruner, distcomp.local_sgd(period=4))
    assert pruners_of(inside) == [pruner]
    assert pruners_of(distcomp.masked(pruner, "qsgd:bits=1")) == [pruner]
    assert pruners_of(distcomp.masked(pruner, distcomp.dpsgd())) == [pruner]
    assert pruners_of(distcomp.qsgd(bits=1)) == []


def test_what_cannot_be_masked_is_refused():
    pruner, _ = pruned()
    with pytest.raises(DistcompError, match="cannot be masked"):
        distcomp.masked(pruner, distcomp.averaging.sparta())
    with pytest.raises(DistcompError, match="cannot be masked"):
        distcomp.masked(pruner, distcomp.averaging.ad_psgd())
    with pytest.raises(DistcompError, match="'keep' or 'drop'"):
        distcomp.masked(pruner, "identity", residuals="lose")
    with pytest.raises(DistcompError, match="on_failure='stop'"):
        distcomp.masked(pruner, distcomp.dpsgd(on_failure="continue"))
