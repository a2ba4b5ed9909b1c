"""The one grammar in which methods and compressors are written::

    text    = name [ ":" key "=" value { "," key "=" value } ]
    value   = number | true | false | none | word | 'quoted' | (tuple) | schedule | text | "(" text ")"

>>> split_call("topk:ratio=0.1,values=(quantize:bits=4)", "method")
('topk', {'ratio': '0.1', 'values': '(quantize:bits=4)'})

A text within a text stands in brackets where it holds a comma. What a value may be is declared by the
annotation of the setting, in text and in calls alike. :func:`canonical` writes what a recipe made in such a
way that equal things are written alike, and are read again.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import operator
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Union, get_args, get_origin

from distcomp.errors import DistcompError
from distcomp.registry import COMPRESSORS, METHODS
from distcomp.schedule import ARROWS, Schedule

MOST_CHARACTERS = 10_000
MOST_IN_A_WORD = 100
MOST_NESTED = 20
LARGEST_INTEGER = 2**31 - 1
"""Counts of bits, elements and steps: what is larger would overflow further down, far from who wrote it."""

_OPENING, _CLOSING = "([{", ")]}"
_WORDS = {"true": True, "false": False, "none": None}
_PLAIN_WORD = re.compile(r"[A-Za-z_][\w.\-]*")
_DEPTH: ContextVar[int] = ContextVar("depth of the text that is read", default=0)


# ------------------------------------------------------------------------------------------------- from text


def split_call(text: str, what: str) -> tuple[str, dict[str, str | None]]:
    """A text's name, and the text of each setting. ``what`` it is the text of, for the errors.

    Raises DistcompError for a text that is too long, whose brackets or quotes do not match, or that says a
    setting twice.
    """
    if len(text) > MOST_CHARACTERS:
        raise DistcompError(
            f"the text of a {what} has at most {MOST_CHARACTERS} characters, and this one has {len(text)}; "
            "build the object in Python instead"
        )
    name, _, rest = unbracketed(text).partition(":")
    settings: dict[str, str | None] = {}
    for part in filter(None, (piece.strip() for piece in _at_commas(rest, text))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in settings:
            raise DistcompError(f"{name.strip()}: {key} is given twice; give it once")
        settings[key] = value if equals else None
    return name.strip(), settings


def unbracketed(text: str) -> str:
    """The text without blanks and brackets around all of it."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and _matching(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _matching(text: str) -> int:
    """Where the bracket that the text begins with is closed; -1 where it is not."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return index
    return -1


def _at_commas(rest: str, text: str) -> list[str]:
    """The settings: cut at commas that are outside of brackets and quotes."""
    pieces: list[str] = []
    depth, begin, quote = 0, 0, ""
    for index, character in enumerate(rest):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "," and depth == 0:
            pieces.append(rest[begin:index])
            begin = index + 1
        depth += 0 if quote else (character in _OPENING) - (character in _CLOSING)
        if depth > MOST_NESTED:
            raise _too_deep()
        if depth < 0:
            break
    if depth or quote:
        raise DistcompError(
            f"a bracket or a quote is not closed in {shortened(text)!r}; close each that is opened"
        )
    return [*pieces, rest[begin:]]


def _too_deep() -> DistcompError:
    return DistcompError(
        f"a text is nested at most {MOST_NESTED} deep, and this one is deeper; build the object in Python"
    )


@contextmanager
def nested() -> Iterator[None]:
    """Around the reading of a text that may hold others. Raises DistcompError where that goes too deep."""
    if _DEPTH.get() >= MOST_NESTED:
        raise _too_deep()
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def read_settings(name: str, texts: Mapping[str, str | None], make: Callable[..., Any]) -> dict[str, Any]:
    """The values that the texts of settings stand for; whether they fit is for :func:`checked` to say.

    Raises DistcompError for a setting that ``make`` does not have.
    """
    known, hints = list(inspect.signature(make).parameters), hints_of(make)
    values = {}
    for key, text in texts.items():
        if key not in known or text is None:
            written_as = key if text is None else f"{key}={text}"
            raise DistcompError(
                f"{name} has no setting {shortened(written_as)!r}{did_you_mean(key, known)}; "
                f"its settings are: {', '.join(known) or 'none'}"
            )
        values[key] = _read(text, hints.get(key, Any))
    return values


def _read(text: str, hint: Any) -> Any:
    """A literal, or a word; where only a text is wanted, also one that looks like something else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = _WORDS.get(text.lower(), text)
    if hint is str and not isinstance(value, str):
        return text
    return text if text.lower() == "none" and not _fits(None, hint) and _fits(text, hint) else value


def _fits(value: Any, hint: Any) -> bool:
    try:
        _fitted(value, hint)
    except TypeError:
        return False
    return True


def no_such(what: str, name: str, known: typing.Iterable[str]) -> DistcompError:
    """The refusal of a name that is in no table."""
    names = sorted(known)
    return DistcompError(
        f"there is no {what} {shortened(name)!r}{did_you_mean(name, names)}; known are: {', '.join(names)}"
    )


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """The name that was probably meant, as a question in brackets; nothing where none is near."""
    near = difflib.get_close_matches(name[:100].lower(), known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= 80 else f"{text[:77]}..."


# --------------------------------------------------------------------------------------- what values may be


@functools.cache
def hints_of(make: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each setting. Of a class, those of its fields."""
    return typing.get_type_hints(make)


def checked(name: str, settings: Mapping[str, Any], make: Callable[..., Any]) -> dict[str, Any]:
    """The settings as ``make`` annotates them: a whole number is taken for a float, a list for a tuple.

    Raises DistcompError for a value of another kind.
    """
    hints, parameters = hints_of(make), inspect.signature(make).parameters
    values = {}
    for key, value in settings.items():
        hint = hints.get(key, Any)
        try:
            if hint is str and isinstance(value, str) and len(value) > MOST_IN_A_WORD:
                raise TypeError
            values[key] = _fitted(value, hint)
        except TypeError:
            default = parameters[key].default
            usual = "" if default is inspect.Parameter.empty else f"; the default is {written(default)}"
            raise DistcompError(
                f"{name}: {key} takes {_kind_of(hint)}, not {shortened(repr(value))}{usual}"
            ) from None
    return values


def _fitted(value: Any, hint: Any) -> Any:
    """The value, of the kind that is wanted. Raises TypeError where it is of none."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return _fitted_to_one(value, get_args(hint))
    kind = get_origin(hint) or hint
    if not isinstance(kind, type) or kind is object:
        return value
    if kind is tuple:
        return _fitted_tuple(value, get_args(hint))
    if kind in (int, float):
        return _fitted_number(value, kind)
    if not isinstance(value, kind) or _is_long_word(value):
        raise TypeError
    return value


def _is_long_word(value: object) -> bool:
    """Whether it is a text of many characters, and cannot be that of a method, a compressor or a schedule."""
    is_long = isinstance(value, str) and len(value) > MOST_IN_A_WORD
    return is_long and ":" not in str(value) and not is_schedule(value)


def _fitted_to_one(value: Any, hints: tuple[Any, ...]) -> Any:
    for exact in (True, False):
        for hint in hints:
            if exact and not (isinstance(hint, type) and type(value) is hint):
                continue
            try:
                return _fitted(value, hint)
            except TypeError:
                continue
    raise TypeError


def _fitted_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if hints and len(hints) != len(value):
        raise TypeError
    return (
        tuple(_fitted(item, hint) for item, hint in zip(value, hints, strict=True)) if hints else tuple(value)
    )


def _fitted_number(value: Any, kind: type) -> Any:
    if isinstance(value, (bool, str | bytes)):
        raise TypeError
    if kind is int:
        whole = operator.index(value)
        if abs(whole) > LARGEST_INTEGER:
            raise TypeError
        return whole
    try:
        number = float(value)
    except (OverflowError, ValueError) as error:
        raise TypeError from error
    if not math.isfinite(number):
        raise TypeError
    return number


def _kind_of(hint: Any) -> str:
    """An annotation in words."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return " or ".join(_kind_of(option) for option in get_args(hint))
    if hint is type(None):
        return "none"
    if hint is int:
        return f"int (at most {LARGEST_INTEGER})"
    return (
        hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    )


# --------------------------------------------------------------------------------------------------- to text


class Written:
    """What a registered recipe may have made: its ``str`` is then the text that makes its equal."""

    @property
    def text(self) -> str | None:
        """The text that makes its equal; None where it was put together by hand."""
        made = self.__dict__.get("_made_by")
        if made is not None and made[0] in METHODS and "_text" not in self.__dict__:
            object.__setattr__(self, "_text", canonical(*made))
        text: str | None = self.__dict__.get("_text")
        return text

    def __str__(self) -> str:
        return self.text or repr(self)


def remember(thing: Any, name: str, settings: Mapping[str, Any]) -> None:
    """Let a thing know which recipe made it, from what."""
    if isinstance(thing, Written):
        object.__setattr__(thing, "_made_by", (name, dict(settings)))


def canonical(name: str, settings: Mapping[str, Any]) -> str:
    """The shortest text of what a recipe makes: settings that change nothing are left out."""
    entry = METHODS[name]
    needed = {key: settings[key] for key in entry.parameters if key in settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = entry.recipe(**needed)
        for key in list(needed):
            fewer = {other: value for other, value in needed.items() if other != key}
            try:
                needed = fewer if entry.recipe(**fewer) == made else needed
            except DistcompError:
                continue
    hints = hints_of(entry.recipe)
    return write_call(name, {key: _rewritten(value, hints.get(key)) for key, value in needed.items()})


def _rewritten(value: Any, hint: Any) -> Any:
    """What a text within stands for, where it is that of a method or a compressor: so it has one spelling."""
    if not isinstance(value, str) or hint is str:
        return value
    name, texts = split_call(value, "method")
    make = (
        METHODS[name].recipe if name in METHODS else COMPRESSORS[name].make if name in COMPRESSORS else None
    )
    if make is None:
        return value
    try:
        return make(**checked(name, read_settings(name, texts, make), make))
    except DistcompError:  # read otherwise by the recipe itself
        return value


def write_call(name: str, settings: Mapping[str, Any]) -> str:
    """``name:key=value,key=value``."""
    pairs = ",".join(f"{key}={written(value)}" for key, value in settings.items())
    return f"{name}:{pairs}" if pairs else name


def written(value: Any) -> str:
    """A value, as it stands in a text."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _is_word(value) else _written_text(value)
    if isinstance(value, int | float | tuple):
        return repr(value)
    text = str(value)
    return f"({text})" if ":" in text or "," in text or text in _WORDS else text


def _is_word(text: str) -> bool:
    return _PLAIN_WORD.fullmatch(text) is not None and text.lower() not in _WORDS


def _written_text(text: str) -> str:
    """A text that is no word: that of a schedule or of a method as it is, anything else in quotes."""
    if is_schedule(text):
        return str(Schedule.parse(text))
    name = unbracketed(text).partition(":")[0].strip()
    return f"({unbracketed(text)})" if ":" in text and _is_word(name) else repr(text)


def is_schedule(value: object) -> bool:
    """Whether a value is meant to be the text of a schedule: that of a method may hold one behind a colon."""
    return (
        isinstance(value, str)
        and "@" in value
        and ":" not in value
        and any(arrow in value for arrow in ARROWS)
    )
