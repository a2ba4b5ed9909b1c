"""The pruner itself: what a model looks like with masks on, the clock, checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from distcomp import DistcompError, Mismatch, pruning
from distcomp.pruning.masks import digest
from tests.pruning.training import NAMES, batch, network, sgd, train


def test_a_masked_model_is_one_that_other_tools_understand():
    model = network()
    before = model(batch(0)[0])
    pruner = pruning.magnitude(model, None, 0.5, steps=(0,))
    assert parametrize.is_parametrized(model[0], "weight")
    assert torch.equal(model(batch(0)[0]), before)
    train(model, sgd(model), 1)
    pruner.settle()
    saved = model.state_dict()
    assert saved["0.parametrizations.weight.0.mask"].dtype == torch.bool
    assert (model[0].weight == 0).float().mean() == pytest.approx(0.5)
    computed = model(batch(0)[0])
    pruning.materialize(model)
    assert set(model.state_dict()) == set(network().state_dict())
    assert torch.equal(model(batch(0)[0]), computed)


def test_a_copy_is_baked_and_the_original_trains_on():
    model = network()
    pruner = pruning.magnitude(model, None, 0.5, steps=(0, 1))
    train(model, sgd(model), 1)
    pruner.settle()
    computed = model(batch(0)[0])
    assert torch.equal(pruning.materialize(copy.deepcopy(model))(batch(0)[0]), computed)
    train(model, sgd(model), 1)
    pruner.settle()
    assert (model[0].weight == 0).float().mean() == pytest.approx(0.5)


def test_the_optimizer_and_ddp_keep_their_parameters():
    model = network()
    before = {id(parameter) for parameter in model.parameters()}
    pruning.gradual(model, None)
    assert {id(parameter) for parameter in model.parameters()} == before
    ignored = model._ddp_params_and_buffers_to_ignore
    assert [name for name, _ in model.named_buffers()] == ignored


def test_the_clock_counts_training_iterations_only():
    model = network()
    pruner = pruning.gradual(model, None)
    x, y = batch(0)
    model(x)
    model(x)
    with torch.no_grad():
        model(x)
    pruner.settle()
    assert pruner.step == 0
    for parts in (1, 3):  # a step of several backwards is several iterations unless DDP's no_sync() says not
        for _ in range(parts):
            nn.functional.cross_entropy(model(x), y).backward()
    pruner.settle()
    pruner.settle()
    assert pruner.step == 4


def test_masks_do_not_change_between_forward_and_step():
    model = network()
    pruner = pruning.magnitude(model, None, 0.5, steps=(0,))
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    assert pruner.density == 1
    model(batch(1)[0])
    assert pruner.density == pytest.approx(0.5)


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MAKERS = {
    "gradual": lambda m, o: pruning.gradual(m, o, 0.8, end=30, every=3),
    "magnitude": lambda m, o: pruning.magnitude(m, o, 0.8, steps=(3, 9, 15)),
    "dns": lambda m, o: pruning.dns(m, o, 0.3, gamma=0.1),
    "dsd": lambda m, o: pruning.dsd(m, o, 0.5, sparse_from=4, dense_from=12),
    "rigl": lambda m, o: pruning.rigl(m, o, 0.8, every=3, until=40),
    "nm": lambda m, o: pruning.nm(m, o, steps=(5, 10, 15)),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("half", [7, 12])
def test_resume_in_the_middle_of_a_schedule_is_bit_equal(name, half):
    def made(seed):
        model = network(seed)
        optimizer = sgd(model, momentum=0.9)
        return model, optimizer, MAKERS[name](model, optimizer)

    model, optimizer, pruner = made(0)
    whole = train(model, optimizer, 20)
    model, optimizer, pruner = made(0)
    train(model, optimizer, half)
    saved = through_a_file([pruner.state_dict(), model.state_dict(), optimizer.state_dict()])
    other, its_optimizer, its_pruner = made(5)
    its_pruner.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    its_optimizer.load_state_dict(saved[2])
    assert train(other, its_optimizer, 20 - half, start=half) == whole[half:]
    assert len(its_pruner.history) >= 2


PATIENT = MAKERS | {"ssl": lambda m, o: pruning.ssl(m, o, until=30, channels=0.05)}


@pytest.mark.parametrize("name", PATIENT)
def test_a_step_that_a_scaler_skips_leaves_weights_masks_and_optimizer_alone(name):
    model = network()
    optimizer = sgd(model, momentum=0.9)
    pruner = PATIENT[name](model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(9):
        pruner.settle()
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (torch.inf if step in (3, 6) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [model.state_dict(), optimizer.state_dict()]
        assert alike(before, after) == (step in (3, 6))
        if name == "rigl" and step in (3, 6):  # due, but there is no gradient to grow by
            pruner.settle()
            assert alike(before, after)
    pruner.settle()
    assert pruner.step == 9
    assert scaler.get_scale() == 1.0


def alike(one: Any, other: Any) -> bool:
    """Whether nested lists and dicts of tensors are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_a_checkpoint_of_other_settings_is_refused():
    saved = pruning.gradual(network(), None, 0.8).state_dict()
    with pytest.raises(DistcompError, match="use the same settings"):
        pruning.gradual(network(), None, 0.7).load_state_dict(saved)


def test_the_history_holds_each_change():
    model = network()
    pruner = pruning.magnitude(model, None, {NAMES[0]: 0.5}, steps=(1, 3))
    train(model, sgd(model), 6)
    assert [change.step for change in pruner.history] == [1, 3]
    assert pruner.history[-1].sparsity == {NAMES[0]: pytest.approx(0.5), NAMES[1]: 0.0}


class Others:
    """Ranks that say what the test wants them to."""

    replicated = False

    def __init__(self, *their_digests):
        self.asked = []
        self.their_digests = their_digests

    def mean(self, x):
        self.asked.append(x.numel())
        return torch.zeros_like(x) if len(self.asked) > 1 else x

    def numbers(self, own):
        return [own, *(own if one is None else one for one in self.their_digests)]


def test_ranks_that_differ_are_named():
    model = network()
    pruner = pruning.magnitude(model, None, 0.5, steps=(0, 1))
    pruner.consensus = Others(None, None)
    train(model, sgd(model), 1)
    pruner.settle()
    assert pruner.consensus.asked == [12 * 16 + 16 * 4]
    pruner.consensus = Others(None, 17)
    with pytest.raises(Mismatch, match="masks of rank 2 differ"):
        train(model, sgd(model), 2)


def test_the_digest_sees_one_bit_a_name_and_a_shape():
    mask = torch.ones(4, 6, dtype=torch.bool)
    other = mask.clone()
    other[2, 3] = False
    found = {digest({"a": mask}), digest({"a": other}), digest({"b": mask}), digest({"a": mask.view(6, 4)})}
    assert len(found) == 4
    assert digest({"a": mask, "b": other}) == digest({"b": other, "a": mask})


def test_fixed_masks_stay():
    model = network()
    mask = torch.zeros(16, 12, dtype=torch.bool)
    mask[:4] = True
    pruner = pruning.fixed(model, {NAMES[0]: mask})
    train(model, sgd(model), 3)
    assert torch.equal(pruner.masks[NAMES[0]], mask)
    assert (model[0].weight[4:] == 0).all()
    pruner.detach()
    train(model, sgd(model), 2)
    assert pruner.step == 2
