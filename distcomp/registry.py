"""What has a name: the table of methods and that of compressors, and nothing else.

Whoever defines one enters it here by a decorator (:func:`distcomp.methods.register`,
:func:`distcomp.compressors.register_compressor`). A room higher up, whose names come when it is imported,
says how to import it (:func:`when_missing`): the table itself knows nobody.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar


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
    """``gradient`` (every step), ``periodic`` (models, every H steps), ``gossip`` (models, neighbours) or
    ``predictions`` (of shared examples, every H steps)."""
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


@dataclass(frozen=True)
class CompressorEntry:
    """A compressor's name, and what makes it from its settings: its class, or a function without settings."""

    name: str
    make: Callable[..., Any]


METHODS: dict[str, Entry] = {}
COMPRESSORS: dict[str, CompressorEntry] = {}

_LOADERS: list[Callable[[], object]] = []

Found = TypeVar("Found")


def when_missing(load: Callable[[], object]) -> None:
    """Call ``load`` once, as soon as a name is asked for that is in no table yet."""
    _LOADERS.append(load)


def find(table: Mapping[str, Found], name: str) -> Found | None:
    """The entry of a name, or None; brings in what has not been imported yet before it gives up."""
    if name not in table:
        load_all()
    return table.get(name)


def load_all() -> None:
    """Import all that enters names."""
    while _LOADERS:
        _LOADERS.pop()()
