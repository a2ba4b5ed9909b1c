"""What is written of every method: law, paper, bytes, settings; and that its name in a config finds it."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest

import distcomp
from distcomp import compressors
from distcomp.compressors import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import METHODS, Entry, Method, parse
from tests.buffers import draw
from tests.conformance.subjects import Subject, inside, methods
from tests.lockstep import once

entries = pytest.mark.parametrize("entry", list(METHODS.values()), ids=lambda entry: entry.name)


@entries
def test_an_entry_says_what_the_tables_need(entry: Entry) -> None:
    assert entry.paper.strip()
    assert entry.wire.strip()
    assert entry.deviations.strip()
    assert entry.kind in ("gradient", "periodic", "gossip", "predictions")
    assert re.fullmatch(r"[A-Z][^\n]*[.:]", entry.summary), (
        f"the first paragraph is not one sentence: {entry.summary!r}"
    )


@entries
def test_every_setting_is_explained(entry: Entry) -> None:
    """In the recipe's docstring, or in that of a class or recipe it refers to."""
    text = inspect.getdoc(entry.recipe) or ""
    for reference in re.findall(r":(?:class|func):`~?([\w.]+)`", text):
        name = reference.rsplit(".", 1)[-1]
        target = getattr(compressors, name, None) or getattr(distcomp.methods, name, None)
        assert target is not None, f"{reference} is not exported"
        text += inspect.getdoc(target) or ""
    for setting in entry.parameters:
        assert re.search(rf"\b{setting}\b", text), f"{entry.name} does not explain {setting}"


@entries
def test_every_setting_has_a_default_and_a_type(entry: Entry) -> None:
    for name, parameter in inspect.signature(entry.recipe).parameters.items():
        assert parameter.default is not inspect.Parameter.empty, f"{entry.name}({name}) has no default"
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("subject", methods(), ids=str)
def test_the_config_string_and_the_call_give_the_same_method(subject: Subject) -> None:
    method = subject.build()
    assert isinstance(method, Method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert parse(subject.text) == method
        assert repr(parse(f" {subject.text} ".replace(",", " , "))) == repr(method)
        assert parse(str(method)) == method
        assert str(parse(str(method))) == str(method)


def test_other_settings_read_otherwise() -> None:
    """Ranks compare reprs when they are attached: a difference that shows nowhere would go unnoticed.

    Two spellings of one method (a default said aloud) may read alike; then they must be equal.
    """
    seen: dict[str, Method] = {}
    for subject in methods():
        method = subject.build()
        assert seen.setdefault(repr(method), method) == method


@entries
def test_a_setting_that_does_not_exist_is_refused_by_name(entry: Entry) -> None:
    with pytest.raises(DistcompError, match="nosuchsetting"):
        parse(f"{entry.name}:nosuchsetting=1")


@entries
def test_a_recipe_is_exported_under_its_name_by_its_room(entry: Entry) -> None:
    name = entry.recipe.__name__
    if entry.recipe.__module__.startswith("distcomp."):
        room = distcomp.methods if entry.kind == "gradient" else distcomp.averaging
        assert getattr(room, name) is entry.recipe
        assert name in room.__all__
        assert name not in distcomp.__all__ or getattr(distcomp, name) is entry.recipe


@entries
def test_what_an_entry_claims_fits_its_method(entry: Entry) -> None:
    """Matrices are summed on the wire if and only if it says so; one that is biased says so."""
    if entry.control or entry.kind != "gradient":
        return
    method, matrices = entry.recipe(), Layout.of([("a", (40, 30)), ("b", (16, 8, 3, 3))])
    kinds = {type(request).__name__ for request in once(method, draw(4, matrices), matrices).asked}
    assert "AllReduce" in kinds if entry.summable else kinds.isdisjoint({"AllReduce"}) or "AllToAll" in kinds
    if any(not c.unbiased for c in inside(method, Compressor)):
        assert entry.biased
