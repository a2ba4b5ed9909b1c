"""Every method by name: what the shell lists, the docs tabulate, the tests run, and a config string names.

A method joins by decorating its recipe (a function whose parameters are the method's settings) with
:func:`register` and by one import line in ``distcomp/methods/__init__.py``. Every numeric setting may then
be a schedule.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from distcomp import compressors
from distcomp.compressors import Compressor
from distcomp.errors import DistcompError
from distcomp.methods.base import Method
from distcomp.methods.scheduled import with_schedules


@dataclass(frozen=True)
class Entry:
    """What is known of a method without running it."""

    name: str
    recipe: Callable[..., Any]
    paper: str
    wire: str
    """Bytes per step and rank, as a formula of d parameters and n ranks."""
    summable: bool
    """Whether its payloads are added on the wire (a plain all-reduce)."""
    biased: bool
    deviations: str
    """Where it differs from the paper."""
    kind: str = "gradient"
    """``gradient`` (every step), ``periodic`` (models, every H steps) or ``gossip`` (models, neighbours)."""
    control: bool = False
    """A control, not a method to train with: it is known not to keep the law of contributions."""
    limitations: str = ""
    """When not to use it."""
    direction: bool = False
    """The estimate is a direction to step in, with momentum in it, not a mean of gradients: over many
    steps, what came in and what was sent balance in its own terms only."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Each setting with its default."""
        return {
            name: None if parameter.default is inspect.Parameter.empty else parameter.default
            for name, parameter in inspect.signature(self.recipe).parameters.items()
        }

    @property
    def summary(self) -> str:
        """The first sentence of the recipe's docstring."""
        return self.doc[0].replace("\n", " ")

    @property
    def doc(self) -> list[str]:
        """The paragraphs of the recipe's docstring."""
        return (inspect.getdoc(self.recipe) or "").split("\n\n")


METHODS: dict[str, Entry] = {}

Recipe = TypeVar("Recipe", bound=Callable[..., Any])


def register(
    *,
    paper: str,
    wire: str,
    summable: bool,
    biased: bool,
    deviations: str = "nowhere",
    kind: str = "gradient",
    control: bool = False,
    direction: bool = False,
    limitations: str = "",
) -> Callable[[Recipe], Recipe]:
    """Enter a recipe under its own name."""

    def enter(recipe: Recipe) -> Recipe:
        recipe = with_schedules(recipe, everywhere=kind == "gradient")
        name = recipe.__name__.rstrip("_")
        METHODS[name] = Entry(
            name, recipe, paper, wire, summable, biased, deviations, kind, control, limitations, direction
        )
        return recipe

    return enter


def parse(text: str) -> Any:
    """The method that a config string names: ``qsgd``, ``qsgd:bits=4,block=128``.

    Raises DistcompError for a name that is not registered, a setting the method does not have, or a value of
    another kind.
    """
    name, _, settings = text.partition(":")
    entry = METHODS.get(name.strip())
    if entry is None:  # methods of averaging stand higher up, and register when they are imported
        importlib.import_module("distcomp.public")
        entry = METHODS.get(name.strip())
    if entry is None:
        raise DistcompError(f"there is no method {name!r}; known are: {', '.join(sorted(METHODS))}")
    arguments: dict[str, Any] = {}
    for setting in filter(None, (part.strip() for part in _split(settings))):
        key, equals, value = setting.partition("=")
        if not equals or key.strip() not in entry.parameters:
            known = ", ".join(entry.parameters) or "none"
            raise DistcompError(f"{name} has no setting {setting!r}; its settings are: {known}")
        arguments[key.strip()] = _literal(value.strip())
    kinds = get_type_hints(entry.recipe)
    for key, value in arguments.items():
        if not _fits(value, kinds.get(key, Any)):
            wanted, default = getattr(kinds[key], "__name__", kinds[key]), entry.parameters[key]
            raise DistcompError(
                f"{name.strip()}: {key} takes {wanted}, not {value!r}; the default is {default!r}"
            )
    return entry.recipe(**arguments)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated kind; the text of a schedule fits any, a whole number fits where a
    float does."""
    if isinstance(value, str) and "@" in value:
        return True
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_fits(value, one) for one in get_args(kind))
    plain = get_origin(kind) or kind
    if not isinstance(plain, type):
        return True
    if isinstance(value, bool):
        return plain in (bool, object)
    return isinstance(value, (int, float) if plain is float else plain)


def method_of(given: Method | str) -> Method:
    """A method within another, given as one or as the text of one; in brackets where it holds commas.

    Raises DistcompError for anything else.
    """
    text = given.strip() if isinstance(given, str) else ""
    method = parse(text.removeprefix("(").removesuffix(")")) if text else given
    if not isinstance(method, Method):
        raise DistcompError(f"{given!r} is no method for gradients; give one such as 'qsgd:bits=4'")
    return method


def compressor_of(given: Compressor | str) -> Compressor:
    """A compressor within a method, given as one or as the text of one: ``TopK:ratio=0.01``.

    Raises DistcompError for a name that the package does not export, or settings that it does not have.
    """
    if isinstance(given, Compressor):
        return given
    name, _, settings = str(given).strip().removeprefix("(").removesuffix(")").partition(":")
    known = {one: kind for one, kind in vars(compressors).items() if one in compressors.__all__}
    kind = known.get(name.strip())
    if kind is None or inspect.isabstract(kind) or not issubclass(kind, Compressor):
        raise DistcompError(f"there is no compressor {name!r}; known are: {', '.join(sorted(known))}")
    pairs = [part.partition("=") for part in _split(settings) if part.strip()]
    arguments = {key.strip(): _literal(value.strip()) for key, _, value in pairs}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise DistcompError(
            f"{name} with {settings!r}: {error}; see its settings in the documentation"
        ) from error
    made: Compressor = kind(**arguments)
    return made


def _split(settings: str) -> list[str]:
    """At commas that are outside brackets."""
    parts, depth = [""], 0
    for character in settings:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(value.lower(), value)
