"""Layers that are switched off for a step: skipped, or computed without being trained.

A layer's class is replaced by a subclass of it whose call asks the switch first, before any hook of the layer
runs: FSDP2 does not gather the weights of a layer that is skipped. Names of parameters stay.

What is switched off has no gradient, and DistributedDataParallel would wait for it. So each parameter is let
take part in the graph by an operation whose backward gives it none: the reducer learns that it is done,
without ``find_unused_parameters``, and before an optimizer steps the zeros that DDP put into ``.grad`` are
taken away.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.active import OBSERVABLES
from distcomp.attaching.target import is_sharded
from distcomp.averaging.base import Averaging
from distcomp.averaging.periodic import Periodic
from distcomp.averaging.recipes.masked import active_only
from distcomp.calls import all_gather
from distcomp.calls.line import line_of
from distcomp.conditional.awake import AwakeLayers, LayersSeen, layers_seen
from distcomp.conditional.choices import LayerChoice
from distcomp.errors import DistcompError, Mismatch
from distcomp.methods import Method, parse
from distcomp.pruning.masks import unwrapped
from distcomp.randomness import Key
from distcomp.schedule import extremes
from distcomp.training import Listener, Source, clock_of
from distcomp.transports.types import ProcessGroup

Off = Literal["skip", "freeze"]
"""What becomes of a layer that is switched off: its input is handed on, or it is computed and not trained."""


class LayerSwitch(Listener):
    """Switches the layers of ``model`` as ``choice`` says, an iteration at a time.

    Iterations are those of the training clock: micro-steps under ``no_sync()`` and recomputed activations
    have the layers of the iteration that they belong to. Evaluation (``model.eval()``) runs every layer, and
    where layers are skipped in training, scales what each adds by its survival probability.

    Args:
        model: as the training loop calls it (under DistributedDataParallel or ``fully_shard``, make the
            switch after the wrapper and before ``distcomp.attach``).
        choice: which layers are awake in an iteration.
        off: ``"skip"`` hands a layer's input on; ``"freeze"`` computes it and does not train it.
        branch: with ``"skip"``, the layers are residual branches ``f`` of ``x + f(x)`` (zeros when dropped);
            otherwise whole blocks ``x + f(x)`` (``x`` when dropped).
        compare: a process group whose ranks compare, in each iteration and before the forward, which layers
            are awake. Without it ranks compare when they exchange gradients, which under FSDP2 is too late.

    Raises DistcompError for layers that are no modules, that are switched already, or whose parameters
    belong to other modules, too.
    """

    source: Source = "parameters"

    def __init__(
        self,
        model: nn.Module,
        choice: LayerChoice,
        off: Off = "skip",
        branch: bool = False,
        compare: ProcessGroup | None = None,
    ) -> None:
        self.name = f"layer switch {next(_NUMBERS)}"
        """In this process: under it methods are told which layers are awake."""
        self.choice = choice
        self.off: Off = off
        self.branch = branch
        self.step = 0
        """The iteration under way, from 0."""
        self.run_layers = 0
        """How many layers were run and trained, so far."""
        self._over = False
        self._trained: frozenset[str] = frozenset()  # awake in a backward since the last step
        self._stepped = False
        self._compared = -1
        self._last_awake = dict.fromkeys(choice.layers, -1)
        self._compare = compare
        self._awake: tuple[int, frozenset[str]] = (-1, frozenset())
        self._clock = clock_of(model)
        module = unwrapped(model)
        self._layers = _layers_of(module, choice.layers)
        _refuse_shared(module, self._layers)
        _check_sharded(module, self._layers, off)
        for name, layer in self._layers.items():
            layer.__class__ = _switched(type(layer))
            layer.__dict__["_distcomp_switch"] = (self, name)
        OBSERVABLES[self.name] = self
        self._clock.listen(self)

    def __deepcopy__(self, memo: object) -> LayerSwitch:
        """A copy of the model asks the same switch."""
        return self

    # ------------------------------------------------------------------------------------ what is awake now

    def awake(self) -> frozenset[str]:
        """The layers that are awake in the iteration under way."""
        if self._awake[0] != self.step:
            self._awake = (self.step, self.choice.awake(self.step))
        return self._awake[1]

    def snapshot(self) -> LayersSeen:
        """What the model has done by now: what the wire asks in each iteration."""
        return LayersSeen(self.step, {**self._last_awake, **dict.fromkeys(self.awake(), self.step)})

    def active_parameters(self, period: int = 1) -> AwakeLayers:
        """The parameters of layers awake in the last ``period`` iterations, as a source of active
        parameters."""
        if not 1 <= period <= LONGEST_PERIOD:
            raise DistcompError(f"a period of 1 to {LONGEST_PERIOD} iterations is remembered, not {period}")
        return AwakeLayers(self.choice, self.name, period)

    def active_only(self, method: Method | Averaging | str, residuals: str = "keep") -> Any:
        """``method`` (an object or its text) for what is awake, to be attached to the model.

        Gradients of layers that are off are not sent, and what is owed to them waits. With periodic averaging
        a layer is sent where it was awake since the last average. Bytes, and what the ranks compare: those of
        :func:`distcomp.averaging.active_only`, whose errors are raised.
        """
        chosen = parse(method) if isinstance(method, str) else method
        period = int(extremes(chosen.period)[1]) if isinstance(chosen, Periodic) else 1
        return active_only(chosen, self.active_parameters(period), residuals)

    # -------------------------------------------------------------------------------------------- the clock

    def backward_ended(self) -> None:
        if self._stepped:
            self._trained, self._stepped = frozenset(), False
        self._trained |= self.awake()
        self._over = True

    def after_step(self, optimizer: Optimizer) -> None:
        self._stepped = True

    def before_step(self, optimizer: Optimizer) -> None:
        """Parameters of layers that are off have no gradient: nothing decays, no momentum moves."""
        for name, layer in self._layers.items():
            if self.choice.shared and name not in self._trained:
                for parameter in layer.parameters():
                    parameter.grad = None

    def _begin_iteration(self) -> None:
        """The first layer that is called after an iteration opens the next one: whoever averages models has
        asked about the last one by then."""
        if self._over:
            self._last_awake |= dict.fromkeys(self.awake(), self.step)
            self.step, self._over = self.step + 1, False
        if self._compare is not None and self._compared != self.step:
            self._compared = self.step
            self._compare_awake(self._compare)

    def _compare_awake(self, group: ProcessGroup) -> None:
        own = torch.tensor([Key.of(self.step, *sorted(self.awake())).seed], dtype=torch.int64)
        numbers = torch.empty(line_of(group).session.size, dtype=torch.int64)
        all_gather(numbers, own, group=group)
        odd = [rank for rank, number in enumerate(numbers.tolist()) if number != int(numbers[0])]
        if odd:
            raise Mismatch(
                f"rank {', '.join(map(str, odd))} has other layers awake than rank 0 in iteration "
                f"{self.step} ({len(self.awake())} of {len(self._layers)} are awake here); use the same seed "
                "and settings on every rank, and resume all ranks from one checkpoint"
            )

    # -------------------------------------------------------------------------------------------- the layers

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def call(
        self, name: str, layer: nn.Module, run: Callable[..., Any], x: Any, *rest: Any, **options: Any
    ) -> Any:
        """What a layer returns."""
        if not layer.training:
            return self._evaluated(name, run, x, *rest, **options)
        if self._clock.building:
            self._begin_iteration()
        if name in self.awake():
            self.run_layers += 1
            out = run(x, *rest, **options)
            if self.off == "skip" and (not isinstance(out, Tensor) or out.shape != x.shape):
                raise _no_block(name)
            return out
        if self.off == "freeze":
            with detached_parameters(layer):
                out = run(x, *rest, **options)
        else:
            out = torch.zeros_like(x) if self.branch else x
        return out if is_sharded(layer) else without_gradients(out, layer.parameters())

    def _evaluated(self, name: str, run: Callable[..., Any], x: Any, *rest: Any, **options: Any) -> Any:
        out = run(x, *rest, **options)
        survival = self.choice.survival(name, self.step) if self.off == "skip" else 1.0
        if survival == 1.0:
            return out
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise _no_block(name)
        return out * survival if self.branch else torch.lerp(x, out, survival)

    # ------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The iteration and what it was counted for: coins are functions of it."""
        return {"choice": repr(self.choice), "off": self.off, "step": self.step + self._over}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with the coins that would have come. Raises DistcompError where the choice was another."""
        own = self.state_dict()
        if (saved.get("choice"), saved.get("off")) != (own["choice"], own["off"]):
            raise DistcompError(
                f"the checkpoint is of {saved.get('choice')!r} and this is {own['choice']}; make the switch "
                "with the same settings"
            )
        step = saved.get("step")
        if not isinstance(step, int) or step < 0:
            raise DistcompError(f"the checkpoint counts {step!r} iterations; it is damaged, take another one")
        self.step, self._over = step, False
        self._last_awake = dict(layers_seen(self.choice, step - 1, LONGEST_PERIOD).last_awake)

    def remove(self) -> None:
        """Leave the model: every layer is itself again, and runs always."""
        self._clock.leave(self)
        for layer in self._layers.values():
            layer.__dict__.pop("_distcomp_switch", None)
            if type(layer) is _switched(type(layer).__mro__[1]):  # else FSDP has subclassed it since
                layer.__class__ = type(layer).__mro__[1]


def _no_block(name: str) -> DistcompError:
    return DistcompError(
        f"{name} does not return a tensor shaped as its input, so it is no residual block and cannot "
        "be left out; name the blocks x + f(x), or with branch=True their branches f"
    )


LONGEST_PERIOD = 1000
"""Iterations that a resumed switch looks back, where models are averaged."""

_NUMBERS = itertools.count()


def layers_named(model: nn.Module, patterns: str | Iterable[str]) -> tuple[str, ...]:
    """The modules whose names match a pattern (``blocks.*``; ``*`` stands for one level), in the model's
    order.

    Raises DistcompError where a pattern matches nothing.
    """
    names = [name for name, _ in unwrapped(model).named_modules() if name]
    chosen: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else tuple(patterns):
        matched = [name for name in names if _matches(name, pattern)]
        if not matched:
            raise DistcompError(
                f"no module is called {pattern!r} (* is one level); the model has {', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}"
            )
        chosen += matched
    return tuple(name for name in names if name in chosen)


class _NoGradient(torch.autograd.Function):
    """The first input, copied; no gradient for the others, which take part in the graph all the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return x.clone()  # a view could not be written to in place by what comes next

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *[None] * ctx.parameters)


def without_gradients(out: Any, parameters: Iterable[nn.Parameter]) -> Any:
    """``out``, with the parameters in its graph: their backward is reached, and gives them no gradient."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return out
    if isinstance(out, tuple):
        return (without_gradients(out[0], trained), *out[1:])
    result: Tensor = _NoGradient.apply(out, *trained)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def detached_parameters(layer: nn.Module) -> Iterator[None]:
    """The layer computes with its weights as constants: gradients pass through it and reach none of them."""
    held = [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for parameters, name, parameter in held:
            parameters[name] = parameter.detach()  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter


_SWITCHED: dict[type[nn.Module], type[nn.Module]] = {}


def _switched(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a kind of layers, always the same one, whose call asks the switch."""

    # torch.compile leaves the switch's decision to Python: traced, each iteration's would be compiled anew.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def call(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        run = partial(kind.__call__, self)
        known = self.__dict__.get("_distcomp_switch")
        if known is None:
            return run(*arguments, **options)
        switch, name = known
        if not arguments:
            raise DistcompError(f"{name} was called without a positional input; call it as layer(x, ...)")
        return switch.call(name, self, run, *arguments, **options)

    if kind not in _SWITCHED:
        body = {"__call__": call, "__module__": kind.__module__}
        _SWITCHED[kind] = type(f"Switched{kind.__name__}", (kind,), body)
    return _SWITCHED[kind]


def _layers_of(module: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            raise DistcompError(f"the model has no module {name!r}; name one as named_modules() does")
        if "_distcomp_switch" in known[name].__dict__:
            raise DistcompError(f"{name} has a switch already; remove() that one first")
    return {name: known[name] for name in names}


def _refuse_shared(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """A parameter that others use has a gradient when its layer is off."""
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        if owners.setdefault(id(parameter), owner) != owner:
            raise DistcompError(
                f"{name} is shared between {owner or 'a module that always runs'} and another one; a layer "
                "that is switched off must not share weights"
            )


def _check_sharded(module: nn.Module, layers: Mapping[str, nn.Module], off: Off) -> None:
    if not any(is_sharded(part) for part in module.modules()):
        return
    if off == "freeze":
        raise DistcompError(
            "layers of an FSDP2 model cannot be frozen for a step: their gradients are reduced with their "
            "module; skip layers, or use DistributedDataParallel"
        )
    for name, layer in layers.items():
        if not is_sharded(layer):
            raise DistcompError(
                f"{name} has no buffer of its own; wrap it: fully_shard({name}), before the model itself"
            )


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
