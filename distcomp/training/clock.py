"""The clock of a training step, one per model, for everybody who acts at its moments.

An *iteration* is a training forward and the backward that followed it, outside ``no_sync()``. It is never the
optimizer's step, which a GradScaler may skip on one rank while others take it. One step of a loop::

    forward_begins   a forward that builds a graph: what the last iteration left to be done is done now
    evaluation_begins   one that builds none
    backward_ended   an iteration is over; within no_sync(), nobody is told
    gradients_used   an optimizer of the model's parameters uses the gradients
    before_step, after_step   around each of its steps

A model has one set of hooks, however many listen; the last who leaves takes them away. The clock holds on to
its model weakly, and a copy of the model (``copy.deepcopy``, an average of weights) does not move the clock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from distcomp.private_torch import (
    NO_BACKWARD,
    at_backward_end,
    backward_number,
    fsdp_accumulates,
    inside_compiled,
)

Source = Literal["parameters", "outputs", "told"]
"""How the clock learns that a backward is under way: a hook on every parameter; one on what the forward
returns, which costs less and misses outputs that hide their tensors; or a listener's word."""


class Listener:
    """Who acts at the moments of a training step. Override what is to be heard."""

    source: Source = "told"

    def forward_begins(self) -> None:
        """A forward that builds a graph is about to begin."""

    def evaluation_begins(self) -> None:
        """A forward that builds no graph is about to begin."""

    def backward_ended(self) -> None:
        """An iteration is over: its backward has ended, all its gradients are there."""

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer of the model's parameters is about to step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""

    def gradients_used(self, optimizer: Optimizer) -> None:
        """The gradients are those of its step: before it, or after it where a closure made them inside."""


class TrainingClock:
    """Tells who listens of the moments of ``model``'s training. See :func:`clock_of`."""

    def __init__(self, model: nn.Module) -> None:
        self.iterations = 0
        """Iterations that have ended since the clock was made."""
        self.in_forward = False
        """Whether a forward of the model is under way."""
        inside = inside_compiled(model)
        self._model = weakref.ref(model)
        self._ddp = weakref.ref(inside) if isinstance(inside, DistributedDataParallel) else None
        self._parameters = _known(model)
        self._listeners: list[Listener] = []
        self._open = False  # a forward has built a graph, and no iteration has ended since
        self._accumulates = False  # as DDP has it: the forward was made within its no_sync()
        self._quiet = 0
        self._backward = NO_BACKWARD
        self._hooks: dict[str, list[Any]] = {}

    # ---------------------------------------------------------------------------------------- who listens

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` from now on, after those who were there before."""
        self._listeners.append(listener)
        self._parameters.update(_known(self._model()))
        if "forward" not in self._hooks:
            self._hooks["forward"] = self._watch_forward()
            _hear_steps(self)
        if listener.source == "parameters" and "parameters" not in self._hooks:
            self._hooks["parameters"] = self._watch_parameters()

    def leave(self, listener: Listener) -> None:
        """Tell ``listener`` no longer. Nothing happens where it does not listen."""
        self._listeners = [other for other in self._listeners if other is not listener]
        if not self._listeners:
            for hook in [hook for hooks in self._hooks.values() for hook in hooks]:
                hook.remove()
            self._hooks.clear()
            _STEPPED[:] = [known for known in _STEPPED if known() not in (None, self)]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients accumulate: a backward in this context ends no iteration."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    # ------------------------------------------------------------------------------------------ the moments

    def gradient_arrived(self) -> None:
        """A gradient of an iteration has come. Called within a backward."""
        number = backward_number()
        if number in (self._backward, NO_BACKWARD):
            return
        self._backward = number
        at_backward_end(self._backward_ended)

    def exchange_begins(self) -> None:
        """As :meth:`gradient_arrived`, from whoever reduces gradients: an iteration is surely under way."""
        self._open, self._accumulates = True, False
        self.gradient_arrived()

    @property
    def building(self) -> bool:
        """Whether a forward of the model that builds a graph is under way, also where a part of it builds
        none (a reentrant checkpoint)."""
        return self.in_forward and self._open

    def _forward_begins(self, module: nn.Module, arguments: object) -> None:
        if module is not self._model():
            return
        self.in_forward = True
        if not torch.is_grad_enabled():
            for listener in tuple(self._listeners):
                listener.evaluation_begins()
            return
        for listener in tuple(self._listeners):
            listener.forward_begins()
        self._open = True
        ddp = self._ddp() if self._ddp is not None else None
        self._accumulates = isinstance(ddp, DistributedDataParallel) and not ddp.require_backward_grad_sync

    def _forward_ended(self, module: nn.Module, arguments: object, outputs: object) -> None:
        if module is not self._model():
            return
        self.in_forward = False
        if not torch.is_grad_enabled() or not any(
            listener.source == "outputs" for listener in self._listeners
        ):
            return
        arrived = _weakly(self, TrainingClock.gradient_arrived)
        for tensor in _tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: arrived())  # type: ignore[no-untyped-call]

    def _parameter_arrived(self) -> None:
        if self._open:
            self.gradient_arrived()

    def _backward_ended(self) -> None:
        self._backward = NO_BACKWARD
        model = self._model()
        if not self._open or self._quiet or self._accumulates:
            return
        if model is not None and fsdp_accumulates(model):
            return
        self._open = False
        self.iterations += 1
        for listener in tuple(self._listeners):
            listener.backward_ended()

    def _before_step(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if not self._steps(optimizer):
            return
        for listener in tuple(self._listeners):
            listener.before_step(optimizer)
        if not _closure(*arguments, **options):
            self._gradients_used(optimizer)

    def _after_step(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if not self._steps(optimizer):
            return
        if _closure(*arguments, **options):
            self._gradients_used(optimizer)
        for listener in tuple(self._listeners):
            listener.after_step(optimizer)

    def _gradients_used(self, optimizer: Optimizer) -> None:
        for listener in tuple(self._listeners):
            listener.gradients_used(optimizer)

    def _steps(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps a parameter of the model."""
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return any(self._holds(parameter) for parameter in held)

    def _holds(self, parameter: Tensor) -> bool:
        known = self._parameters.get(id(parameter))
        return known is not None and known() is parameter

    # ------------------------------------------------------------------------------------------- the hooks

    def _watch_forward(self) -> list[Any]:
        model = self._model()
        if model is None:
            raise RuntimeError("the model is gone; nobody can listen to its training")
        return [
            # before FSDP's own hook, which gathers the weights that a listener may be about to change
            model.register_forward_pre_hook(_OwnHook(uncompiled(self._forward_begins)), prepend=True),
            model.register_forward_hook(_OwnHook(uncompiled(self._forward_ended)), always_call=True),
        ]

    def _watch_parameters(self) -> list[Any]:
        arrived = _weakly(self, TrainingClock._parameter_arrived)
        parameters = [known() for known in self._parameters.values()]
        return [
            parameter.register_hook(lambda _: arrived())  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter is not None and parameter.requires_grad
        ]


class _OwnHook:
    """A hook of this model alone: a copy of the model, or one that is saved and loaded, has an empty one.

    It leads to whoever listens, and so to process groups, which nobody can copy.
    """

    def __init__(self, hook: Callable[..., Any] | None = None) -> None:
        self._hook = hook

    def __call__(self, *arguments: Any) -> None:
        if self._hook is not None:
            self._hook(*arguments)

    def __deepcopy__(self, memo: object) -> _OwnHook:
        return _OwnHook()

    def __reduce__(self) -> tuple[type[_OwnHook], tuple[()]]:
        return _OwnHook, ()


_STEPPED: list[weakref.ref[TrainingClock]] = []
"""The clocks that hear of optimizers' steps, in the order in which somebody began to listen."""

_STEP_HOOKS: list[Any] = []


def _hear_steps(clock: TrainingClock) -> None:
    """Tell ``clock`` of every optimizer's steps.

    Two hooks serve all clocks and stay: torch walks over its hooks while they run, so that one that is taken
    away meanwhile, by a listener that leaves or because a clock was collected, would end the user's step.
    """
    _STEPPED[:] = [known for known in _STEPPED if known() is not None]
    _STEPPED.append(weakref.ref(clock))
    if not _STEP_HOOKS:
        _STEP_HOOKS.append(register_optimizer_step_pre_hook(_before_a_step))
        _STEP_HOOKS.append(register_optimizer_step_post_hook(_after_a_step))


def _before_a_step(optimizer: Optimizer, arguments: Any, options: Any) -> None:
    for known in tuple(_STEPPED):
        clock = known()
        if clock is not None:
            clock._before_step(optimizer, arguments, options)


def _after_a_step(optimizer: Optimizer, arguments: Any, options: Any) -> None:
    for known in tuple(_STEPPED):
        clock = known()
        if clock is not None:
            clock._after_step(optimizer, arguments, options)


_CLOCKS: WeakKeyDictionary[nn.Module, weakref.ref[TrainingClock]] = WeakKeyDictionary()


def clock_of(model: nn.Module) -> TrainingClock:
    """The clock of a model, as the training loop calls it. The model's hooks keep it alive while somebody
    listens."""
    known = _CLOCKS.get(model)
    clock = known() if known is not None else None
    if clock is None:
        clock = TrainingClock(model)
        _CLOCKS[model] = weakref.ref(clock)
    return clock


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, which torch.compile leaves to Python. Said here and not by a decorator, for that would import
    the compiler, which takes seconds, together with distcomp."""
    left_alone: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return left_alone


def _known(model: nn.Module | None) -> dict[int, weakref.ref[nn.Parameter]]:
    """The parameters by id: weakly, since an id alone may come back as another model's parameter once this
    model is gone."""
    return (
        {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}
        if model is not None
        else {}
    )


def _weakly(clock: TrainingClock, method: Callable[..., None]) -> Callable[..., None]:
    """``method`` of ``clock``, for as long as there is such a clock."""
    known = weakref.ref(clock)

    def call(*arguments: Any) -> None:
        clock = known()
        if clock is not None:
            method(clock, *arguments)

    return call


def _closure(optimizer: Optimizer, closure: object = None, **options: object) -> bool:
    """Whether ``optimizer.step`` was given one, as Lightning does: the backward runs inside the step."""
    return closure is not None


def _tensors(outputs: object) -> Iterator[Tensor]:
    """The tensors of what a forward returned, inside tuples, lists and mappings."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple):
        for output in outputs:
            yield from _tensors(output)
    elif isinstance(outputs, dict):
        yield from _tensors(list(outputs.values()))
