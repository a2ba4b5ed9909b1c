"""Names, settings as text, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distcomp.errors import DistcompError
from distcomp.methods import METHODS, parse, register


@pytest.fixture
def probe() -> Iterator[str]:
    """A recipe that returns what it was called with."""

    @register(
        paper="none", wire="0", summable=False, biased=True, deviations="here", kind="gossip", control=True
    )
    def probe_(a: int = 1, b: object = None, word: str = "x"):
        """Return what it was given.

        More than the summary is written further down.
        """
        return {"a": a, "b": b, "word": word}

    yield "probe"
    del METHODS["probe"]


def test_an_entry_is_known_by_its_name_without_a_trailing_underscore(probe: str) -> None:
    entry = METHODS[probe]
    assert entry.summary == "Return what it was given."
    assert entry.parameters == {"a": 1, "b": None, "word": "x"}
    assert (entry.paper, entry.wire, entry.summable, entry.biased) == ("none", "0", False, True)
    assert (entry.deviations, entry.kind, entry.control) == ("here", "gossip", True)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("probe", {}),
        ("probe:", {}),
        ("probe:a=2", {"a": 2}),
        (" probe : a = 2 , word = y z ", {"a": 2, "word": "y z"}),
        ("probe:b=[1,2],a=3", {"b": [1, 2], "a": 3}),
        ("probe:b=(1,(2,3))", {"b": (1, (2, 3))}),
        ("probe:b={'k': 1, 'l': 2}", {"b": {"k": 1, "l": 2}}),
        ("probe:b=true", {"b": True}),
        ("probe:b=False", {"b": False}),
        ("probe:b=none", {"b": None}),
        ("probe:b=-1.5e-3", {"b": -1.5e-3}),
        ("probe:word=a=b", {"word": "a=b"}),
        ("probe:a=2,", {"a": 2}),
    ],
)
def test_settings_are_read_from_text(probe: str, text: str, changed: dict[str, object]) -> None:
    assert parse(text) == {"a": 1, "b": None, "word": "x", **changed}


def test_a_name_that_is_not_registered_is_refused_with_those_that_are(probe: str) -> None:
    with pytest.raises(DistcompError, match=r"there is no method 'nosuch'; known are: .*probe"):
        parse("nosuch:a=1")
    with pytest.raises(DistcompError, match="there is no method ''"):
        parse("")


@pytest.mark.parametrize("setting", ["c=1", "a", "=1", "A=1"])
def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(probe: str, setting: str) -> None:
    with pytest.raises(DistcompError, match=r"probe has no setting .*; its settings are: a, b, word"):
        parse(f"probe:{setting}")


@pytest.mark.parametrize("text", ["qsgd:bits=four", "qsgd:bits=none", "qsgd:block=[1]", "qsgd:bits=4.5"])
def test_a_value_of_the_wrong_kind_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(DistcompError, match=r"^qsgd.*(bits|block)"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["qsgd:bits=0", "qsgd:bits=9", "qsgd:block=0", "qsgd:norm=l7", "qsgd:pattern=x"]
)
def test_a_value_out_of_range_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(DistcompError, match=r".+; .+|.+, not .+"):
        parse(text)


def test_an_illegal_pairing_is_refused_at_construction() -> None:
    with pytest.raises(
        DistcompError, match="cannot be added on the wire; use pattern='all_gather' or 'reduce_scatter'"
    ):
        parse("qsgd:pattern=all_reduce")


def test_nothing_in_a_config_string_is_executed() -> None:
    with pytest.raises(DistcompError):
        parse("qsgd:norm=__import__('os').getcwd()")
