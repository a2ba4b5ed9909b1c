"""The clock of a training step: iterations, not optimizer steps; one set of hooks; nobody is kept alive."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.training import Listener, clock_of
from distcomp.training.clock import Source


class Notes(Listener):
    """Writes down what it is told."""

    def __init__(self, source: Source = "parameters") -> None:
        self.source = source
        self.answers: list[str] = []

    def forward_begins(self) -> None:
        self.answers.append("forward")

    def backward_ended(self) -> None:
        self.answers.append("backward")

    def before_step(self, optimizer: Optimizer) -> None:
        self.answers.append("before")

    def after_step(self, optimizer: Optimizer) -> None:
        self.answers.append("after")

    def gradients_used(self, optimizer: Optimizer) -> None:
        self.answers.append("used")


def hooks_of(model: nn.Module) -> int:
    held = [model._forward_pre_hooks, model._forward_hooks, *(p._backward_hooks for p in model.parameters())]
    return sum(len(hooks or ()) for hooks in held)


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("source", ["parameters", "outputs"])
def test_a_step_has_its_moments_in_order(source: Source) -> None:
    model, notes = nn.Linear(3, 2), Notes(source)
    clock_of(model).listen(notes)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert notes.answers == ["forward", "backward", "before", "used", "after"]
    assert clock_of(model).iterations == 1


def test_the_backward_has_ended_when_all_gradients_are_there() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    there: list[bool] = []

    class Looks(Listener):
        source: Source = "parameters"

        def backward_ended(self) -> None:
            there.extend(parameter.grad is not None for parameter in model.parameters())

    clock_of(model).listen(Looks())
    model(torch.ones(2, 3)).sum().backward()
    assert there == [True] * 4


def test_evaluation_is_no_moment() -> None:
    model, notes = nn.Linear(3, 2), Notes()
    clock_of(model).listen(notes)
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert notes.answers == []


def test_within_no_sync_no_iteration_ends() -> None:
    model, notes = nn.Linear(3, 2), Notes()
    clock = clock_of(model)
    clock.listen(notes)
    with clock.no_sync():
        model(torch.ones(2, 3)).sum().backward()
    assert "backward" not in notes.answers
    model(torch.ones(2, 3)).sum().backward()
    assert notes.answers.count("backward") == 1


def test_a_backward_that_raises_ends_no_iteration_and_the_next_one_does() -> None:
    model, notes = nn.Linear(3, 2), Notes()
    clock_of(model).listen(notes)
    broken = model(torch.ones(2, 3))

    def fail(_: Tensor) -> None:
        raise ValueError("the user's own")

    hook = model.bias.register_hook(fail)
    with pytest.raises(ValueError, match="the user's own"):
        broken.sum().backward()
    assert "backward" not in notes.answers
    hook.remove()
    model(torch.ones(2, 3)).sum().backward()
    assert notes.answers.count("backward") == 1


def test_a_closure_uses_its_gradients_after_the_step() -> None:
    model, notes = nn.Linear(3, 2), Notes()
    clock_of(model).listen(notes)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure() -> Any:
        loss = model(torch.ones(2, 3)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert notes.answers == ["before", "forward", "backward", "used", "after"]


def test_the_optimizer_of_another_model_is_not_heard() -> None:
    model, other, notes = nn.Linear(3, 2), nn.Linear(3, 2), Notes()
    clock_of(model).listen(notes)
    step(other, torch.optim.SGD(other.parameters(), 0.1))
    assert notes.answers == []


def test_a_clock_that_goes_in_the_middle_of_a_step_does_not_disturb_it() -> None:
    """torch walks over the hooks of all optimizers while they run."""
    model, other, notes = nn.Linear(3, 2), [nn.Linear(3, 2)], Notes()

    class Leaves(Notes):
        def before_step(self, optimizer: Optimizer) -> None:
            clock_of(model).leave(self)
            other.clear()
            gc.collect()

    clock_of(model).listen(Leaves())
    clock_of(other[0]).listen(Notes())
    clock_of(model).listen(notes)
    gone = weakref.ref(clock_of(other[0]))
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert gone() is None
    assert notes.answers == ["forward", "backward", "before", "used", "after"]


def test_many_listeners_have_one_set_of_hooks_and_the_last_takes_it_away() -> None:
    model, listeners = nn.Linear(3, 2), [Notes(), Notes(), Notes("outputs")]
    for listener in listeners:
        clock_of(model).listen(listener)
    assert hooks_of(model) == 4  # before and after a forward, and one on each parameter
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert listeners[0].answers == listeners[1].answers == listeners[2].answers
    for listener in listeners:
        clock_of(model).leave(listener)
    assert hooks_of(model) == 0


def test_a_copy_of_the_model_does_not_move_the_clock() -> None:
    model, notes = nn.Linear(3, 2), Notes()
    clock_of(model).listen(notes)
    twin = copy.deepcopy(model)
    step(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert notes.answers == []


def test_a_model_under_torch_compile_has_its_moments() -> None:
    model, notes = torch.compile(nn.Linear(3, 2), backend="eager"), Notes("outputs")
    clock_of(model).listen(notes)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert notes.answers == ["forward", "backward", "before", "used", "after"]


def test_nobody_is_kept_alive_and_nobody_taken_for_another() -> None:
    """CPython gives the addresses of a dead model's parameters to the next one's, when it likes."""
    model, notes = nn.Linear(1, 1), Notes()
    clock_of(model).listen(notes)
    gone, clock = weakref.ref(model), weakref.ref(clock_of(model))
    dead = next(iter(clock_of(model)._parameters.values()))
    del model
    gc.collect()
    assert gone() is None
    assert clock() is None
    following = nn.Linear(1, 1)
    active = clock_of(following)
    active.listen(notes)
    active._parameters = {id(parameter): dead for parameter in following.parameters()}
    following(torch.ones(1)).backward()
    torch.optim.SGD(following.parameters(), lr=0.1).step()
    assert notes.answers == ["forward", "backward"]
