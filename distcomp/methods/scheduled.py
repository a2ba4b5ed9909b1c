"""Methods that change with the step: any numeric setting by a schedule, and a warm-up without compression."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, Union, get_args, get_origin

from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.grammar import checked, hints_of, is_schedule
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext, cut_state
from distcomp.methods.from_compressor import from_compressor
from distcomp.schedule import Schedule

PROBE = Layout.of([("matrix", (24, 20)), ("convolution", (8, 6, 3, 3)), ("bias", (8,))])
"""On which states are compared."""


@dataclass(frozen=True)
class Scheduled(Method):
    """The method that ``recipe`` builds from the settings' values of the step.

    Every registered recipe makes one where a setting is given as a :class:`~distcomp.schedule.Schedule`.
    The state must be of one form throughout: set a recipe that keeps a residual only for some values to keep
    one always. On the wire, in each step: the bytes of that step's method.

    Raises DistcompError for a value that the recipe refuses, and for states that differ in form.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]
    recipe: Callable[..., Method] = field(repr=False)

    def __post_init__(self) -> None:
        forms = {step: _form(self.in_step(step).init(PROBE)) for step in self._changes}
        odd = next((step for step, form in forms.items() if form != forms[0]), None)
        if odd is not None:
            raise DistcompError(
                f"{self.name} keeps other state in step {odd} than in step 0; fix its other settings so "
                "that it does not, for instance error_feedback=true"
            )

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return all(self.in_step(step).propagates_nonfinite for step in self._changes)

    @property
    def _changes(self) -> list[int]:
        """The steps in which a setting begins another value, and step 0."""
        points = (setting.points for _, setting in self.settings if isinstance(setting, Schedule))
        return sorted({0, *(step for steps in points for step, _ in steps)})

    def in_step(self, step: int) -> Method:
        """The method of one step."""
        return _built(self.recipe, tuple((name, _value(setting, step)) for name, setting in self.settings))

    def children(self) -> dict[str, Method]:
        return {f"step {step}": self.in_step(step) for step in self._changes}

    def init(self, layout: Layout) -> State:
        return self.in_step(0).init(layout)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return (yield from self.in_step(context.step).aggregate(x, state, context))

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.in_step(step).payload_bytes(layout, size, step)


# A method is a value: made once for all steps in which its settings have these values.
@functools.lru_cache(maxsize=256)
def _built(recipe: Callable[..., Method], settings: tuple[tuple[str, Any], ...]) -> Method:
    return recipe(**dict(settings))


def _value(setting: Any, step: int) -> Any:
    """The setting's value in a step: a whole number where all of the schedule's are."""
    if not isinstance(setting, Schedule):
        return setting
    return round(setting(step)) if _whole(setting) else setting(step)


def _whole(schedule: Schedule) -> bool:
    return all(float(value).is_integer() for value in schedule.values)


def _form(state: State) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (name, path): tuple(leaf.shape)
        for name, leaves in cut_state(state).items()
        for path, leaf in leaves.items()
    }


Recipe = TypeVar("Recipe", bound=Callable[..., Any])


def with_schedules(recipe: Recipe, everywhere: bool = True) -> Recipe:
    """The recipe, whose settings may now also be schedules or the text of one (``bits="8 -> 4 @ 1000"``).

    Without ``everywhere`` only those annotated as such may; others are refused with a DistcompError.
    """
    signature = inspect.signature(recipe)
    native = {
        name for name, parameter in signature.parameters.items() if "Schedule" in str(parameter.annotation)
    }
    numeric = {name for name, hint in hints_of(recipe).items() if _is_number(hint)}
    title = recipe.__name__.rstrip("_")

    @functools.wraps(recipe)
    def build(*arguments: Any, **settings: Any) -> Any:
        given = dict(signature.bind(*arguments, **settings).arguments)
        read = {name: setting if name in native else _read(setting) for name, setting in given.items()}
        changing = {
            name for name, setting in read.items() if isinstance(setting, Schedule) and name not in native
        }
        if changing and not (everywhere and changing <= numeric):
            fixed = min(changing - numeric or changing)
            may = sorted(native | numeric) if everywhere else sorted(native)
            raise DistcompError(
                f"{title}: {fixed} cannot change with the step; give one value"
                + (f" (a schedule may be given for {', '.join(may)})" if may else "")
            )
        broken = [name for name in changing if hints_of(recipe)[name] is int and not _whole(read[name])]
        if broken:
            raise DistcompError(f"{title}: {broken[0]} counts; give a schedule of whole numbers")
        fixed_ = {name: setting for name, setting in read.items() if name not in changing}
        read |= checked(title, fixed_, recipe)
        if changing:
            return Scheduled(title, tuple(read.items()), recipe)
        return recipe(**read)

    return build  # type: ignore[return-value]


def _read(setting: Any) -> Any:
    """A schedule where the setting is the text of one."""
    return Schedule.parse(setting) if is_schedule(setting) else setting


def _is_number(hint: Any) -> bool:
    """Whether an annotation admits a number; a tuple of numbers is none."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(_is_number(one) for one in get_args(hint))
    return hint in (int, float)


EXACT = from_compressor(Identity())
"""The mean in float32: what is sent where nothing is compressed."""


@dataclass(frozen=True)
class Warmup(Method):
    """Send float32 (go through ``before``) in the first ``steps`` steps and through ``inner`` afterwards.

    ``estimate = mean(x)`` and ``contribution_i = x_i`` while it lasts; ``inner`` keeps the state it began
    with. A function of the step only: a run resumed in the middle goes on warming up. On the wire:
    ``2 (n-1)/n 4d`` bytes while it lasts.

    Raises DistcompError for a negative number of steps.
    """

    inner: Method
    steps: int
    before: Method = field(default=EXACT, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise DistcompError(f"a warm-up lasts 0 steps or more, not {self.steps}")

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.inner.propagates_nonfinite and self.before.propagates_nonfinite

    def init(self, layout: Layout) -> State:
        return self.inner.init(layout)

    def assumed_state(self, layout: Layout, step: int) -> State:
        return self.inner.assumed_state(layout, step)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        if context.step >= self.steps:
            return (yield from self.inner.aggregate(x, state, context))
        result = yield from self.before.aggregate(x, {}, context)
        return replace(result, state=state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        method = self.before if step < self.steps else self.inner
        return method.payload_bytes(layout, size, step)
