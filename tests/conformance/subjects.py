"""What the conformance tests is run on: everything registered, at its defaults and at every pair of other
settings.

Nothing here names a method. Which values a setting may take is found out by trying: numbers and booleans from
a short list; for words, a nonsense word is offered and the refusal, which must name what is allowed, is read.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from distcomp import compressors
from distcomp.compressors import Compressor
from distcomp.errors import DistcompError
from distcomp.methods import METHODS, Entry, Method
from distcomp.registry import load_all

Settings = dict[str, Any]

NUMBERS = (1, 3, 7)
MOST_PAIRED = 4
"""How many choices beside the default are tried at most of one method: the whole must stay quick."""


@dataclass(frozen=True)
class Subject:
    """One method or compressor at one choice of settings."""

    name: str
    make: Callable[..., Any]
    settings: Mapping[str, Any]
    entry: Entry | None = None

    @property
    def text(self) -> str:
        """As a config string names it."""
        return self.name + ":" + ",".join(f"{key}={value}" for key, value in self.settings.items())

    def __str__(self) -> str:
        return self.text.rstrip(":")

    def build(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make(**self.settings)

    @property
    def warns(self) -> bool:
        """Whether these settings are built under a warning: then they are not promised to converge."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.make(**self.settings)
        return bool(caught)


def methods() -> list[Subject]:
    """Every registered method that is not a control, with its settings."""
    load_all()
    # A copy: trying settings looks up names, which may bring in what installed plug-ins register.
    entries = tuple(METHODS.values())
    return [
        Subject(entry.name, entry.recipe, settings, entry)
        for entry in entries
        if not entry.control and entry.kind == "gradient"
        for settings in choices(entry.recipe)
    ]


def default_methods() -> list[Subject]:
    return [subject for subject in methods() if not subject.settings]


def every_compressor() -> list[Subject]:
    """Every compressor that the package exports, with its settings."""
    kinds = [getattr(compressors, name) for name in compressors.__all__]
    return [
        Subject(kind.__name__, kind, settings)
        for kind in kinds
        if inspect.isclass(kind) and issubclass(kind, Compressor) and not inspect.isabstract(kind)
        for settings in choices(kind)
    ]


def choices(make: Callable[..., Any]) -> list[Settings]:
    """The default, then settings that cover every legal pair of two values, up to a limit."""
    domains = {
        name: [parameter.default, *alternatives(make, name, parameter.default)]
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return [{}, *itertools.islice(_pairs(make, domains), MOST_PAIRED)]


def alternatives(make: Callable[..., Any], name: str, default: Any) -> list[Any]:
    """Other values that ``make`` accepts for this parameter when the rest are at their defaults."""
    kinds = set(get_args(get_type_hints(make).get(name))) | {type(default)}
    offered: list[Any] = []
    if bool in kinds:
        offered = [True, False]
    elif int in kinds:
        offered = list(NUMBERS)
    elif isinstance(default, float):
        offered = [default / 2, default * 2]
    elif isinstance(default, str):
        offered = words_of_refusal(make, name)
    return [value for value in offered if value != default and accepts(make, {name: value})]


def words_of_refusal(make: Callable[..., Any], name: str) -> list[str]:
    """The words of the sentence that refuses nonsense; none where anything goes."""
    try:
        make(**{name: "nonsense"})
    except DistcompError as refusal:
        return list(dict.fromkeys(re.findall(r"\w+", str(refusal))))
    return []


def accepts(make: Callable[..., Any], settings: Settings) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make(**settings)
        except DistcompError:
            return False
    return True


def _pairs(make: Callable[..., Any], domains: Mapping[str, list[Any]]) -> Iterator[Settings]:
    """Greedily: take the legal combination that covers most pairs not yet seen, until none is left."""
    names = [name for name, values in domains.items() if len(values) > 1]
    if len(names) == 1:
        yield from ({names[0]: value} for value in domains[names[0]][1:])
        return
    todo = {
        frozenset([(a, repr(x)), (b, repr(y))])
        for a, b in itertools.combinations(names, 2)
        for x in domains[a]
        for y in domains[b]
        if accepts(make, {a: x, b: y})
    }
    while todo:
        best = _cover(make, names, domains, todo)
        if best is None:
            return
        todo -= _covered(best)
        if settings := {name: value for name, value in best.items() if value != domains[name][0]}:
            yield settings


def _cover(
    make: Callable[..., Any], names: list[str], domains: Mapping[str, list[Any]], todo: set[frozenset[Any]]
) -> Settings | None:
    """Start from the first pair that is left and give each other parameter the value that covers most."""
    for pair in sorted(todo, key=lambda pair: sorted(pair)):
        chosen = {
            name: next(value for value in domains[name] if repr(value) == text) for name, text in sorted(pair)
        }
        for name in names:
            if name in chosen:
                continue
            legal = [value for value in domains[name] if accepts(make, {**chosen, name: value})]
            if not legal:
                break
            gains = [len(_covered({**chosen, name: value}) & todo) for value in legal]
            chosen[name] = legal[gains.index(max(gains))]
        else:
            return chosen
        todo.discard(pair)
    return None


def _covered(settings: Settings) -> set[frozenset[Any]]:
    return {
        frozenset([(a, repr(x)), (b, repr(y))])
        for (a, x), (b, y) in itertools.combinations(settings.items(), 2)
    }


def inside(method: Method, kind: type) -> list[Any]:
    """The objects of a class that a method is made of."""
    found = [method] if isinstance(method, kind) else []
    if dataclasses.is_dataclass(method):
        for field in dataclasses.fields(method):
            found += inside(getattr(method, field.name), kind)
    return found
