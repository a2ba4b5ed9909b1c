"""How a method gets its name, and how a text becomes one.

A method joins by decorating its recipe (a function whose parameters are the method's settings) with
:func:`register` and by one import line in ``distcomp/methods/__init__.py``. Every numeric setting may then
be a schedule. How texts are written is said in :mod:`distcomp.grammar`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from distcomp.compressors.base import Compressor, parse_compressor
from distcomp.errors import DistcompError
from distcomp.grammar import nested, no_such, read_settings, remember, shortened, split_call
from distcomp.methods.base import Method
from distcomp.methods.scheduled import with_schedules
from distcomp.plugins import lookup
from distcomp.registry import COMPRESSORS, METHODS, Entry

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
    """Enter a recipe under its own name. What each argument says: :class:`distcomp.registry.Entry`.

    The recipe's settings are then checked by their annotations, in calls as in texts, and what it makes knows
    the text that makes its equal (``str``).
    """

    def enter(recipe: Recipe) -> Recipe:
        name = recipe.__name__.rstrip("_")
        recipe = _remembered(name, with_schedules(recipe, everywhere=kind == "gradient"))
        METHODS[name] = Entry(
            name, recipe, paper, wire, summable, biased, deviations, kind, control, limitations, direction
        )
        return recipe

    return enter


def _remembered(name: str, recipe: Recipe) -> Recipe:
    """The recipe, whose methods know what made them."""

    @functools.wraps(recipe)
    def build(*arguments: Any, **settings: Any) -> Any:
        made = recipe(*arguments, **settings)
        remember(made, name, signature.bind(*arguments, **settings).arguments)
        return made

    signature = inspect.signature(recipe)
    return build  # type: ignore[return-value]


def parse(text: str) -> Any:
    """The method that a text names: ``qsgd``, ``qsgd:bits=4,block=128``, ``warmup:inner=(topk:ratio=0.1)``.

    Raises DistcompError for a name that is not registered, a setting that the method does not have or that is
    given twice, a value of another kind, and a text that is too long or nested too deep.
    """
    name, texts = split_call(text, "method")
    entry = lookup(METHODS, name)
    if entry is None:
        raise no_such("method", name, METHODS)
    with nested():
        return entry.recipe(**read_settings(name, texts, entry.recipe))


def method_of(given: Method | str) -> Method:
    """A method within another, given as one or as the text of one; in brackets where it holds commas.

    Raises DistcompError for anything else.
    """
    method = parse(given) if isinstance(given, str) and given.strip() else given
    if not isinstance(method, Method):
        raise DistcompError(
            f"{shortened(str(given))!r} is no method for gradients; give one such as 'qsgd:bits=4'"
        )
    return method


def compressor_of(given: Compressor | Method | str) -> Compressor:
    """A compressor within a method, given as one or as its text: ``topk:ratio=0.01``, ``sign``, ``int8``.

    Or as a method, or the text of one: ``qsgd:bits=4``. Then the one inside it is meant.

    Raises DistcompError for a method that is more than a compressor: it is an exchange, not a payload.
    """
    if isinstance(given, Compressor):
        return given
    if isinstance(given, str):
        name, texts = split_call(given, "compressor")
        entry, is_method = lookup(COMPRESSORS, name), lookup(METHODS, name) is not None
        # Some names are those of both, such as topk; settings that only the method has decide which is meant.
        if entry is not None and (
            not is_method or texts.keys() <= inspect.signature(entry.make).parameters.keys()
        ):
            return parse_compressor(given)
        if not is_method:
            raise no_such("compressor", name, COMPRESSORS.keys() | METHODS.keys())
    compressor = method_of(given).sole_compressor()
    if compressor is None:
        raise DistcompError(
            f"'{shortened(str(given))}' is an exchange of all ranks, and here one payload is sent; use a "
            "compressor such as 'quantize:bits=4', 'topk:ratio=0.01' or 'sign'"
        )
    return compressor
