"""A fabric says what network it is: units, the TOML file, and the law of a path."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcomp.errors import DistcompError
from distcomp.network import UNSHAPED, Fabric, Rack, fabric, format_rate, format_time, parse_rate, parse_time

rates = st.one_of(
    st.just(UNSHAPED),
    st.integers(1, 400).map(lambda n: n * 1e6),
    st.floats(1e-3, 1e12, allow_nan=False),
)
delays = st.one_of(st.just(0.0), st.integers(1, 999).map(lambda n: n * 1e-3), st.floats(0, 1e3))


@pytest.mark.parametrize(
    ("text", "bps"),
    [
        ("100mbit", 100e6),
        ("2.5gbit", 2.5e9),
        ("100 Mbit/s", 100e6),
        ("64kbit", 64e3),
        ("9600bit", 9600.0),
        ("100Mbps", 100e6),
        ("1Gbps", 1e9),
        ("100mbps", 100e6),
        ("unshaped", math.inf),
        (5e6, 5e6),
    ],
)
def test_rates_as_people_write_them(text: str | float, bps: float) -> None:
    assert parse_rate(text) == bps


@pytest.mark.parametrize(
    "text",
    [
        "100MBps",
        "100 MB/s",
        "100kB",
        "100",
        "fast",
        "",
        "-5mbit",
        "0mbit",
        "1e3mbit",
        "100mbit/h",
        0,
        -1.0,
        math.nan,
        True,
        None,
    ],
)
def test_a_rate_that_cannot_be_meant_is_an_error_with_a_remedy(text: object) -> None:
    with pytest.raises(DistcompError, match='like "100mbit"'):
        parse_rate(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("20ms", 0.02), ("100us", 1e-4), ("1.5s", 1.5), ("0ms", 0.0), (0.25, 0.25)]
)
def test_delays_as_people_write_them(text: str | float, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["20", "20 minutes", "-1ms", "20ms/s", -0.1, math.inf, math.nan, None])
def test_a_delay_that_cannot_be_meant_is_an_error_with_a_remedy(text: object) -> None:
    with pytest.raises(DistcompError, match='like "20ms"'):
        parse_time(text)  # type: ignore[arg-type]


@given(rates)
def test_a_rate_survives_being_written(rate_bps: float) -> None:
    assert parse_rate(format_rate(rate_bps)) == rate_bps


@given(delays)
def test_a_delay_survives_being_written(delay_s: float) -> None:
    assert parse_time(format_time(delay_s)) == delay_s


@st.composite
def fabrics(draw: st.DrawFn) -> Fabric:
    speeds = draw(st.lists(rates, min_size=1, max_size=6))
    racks: dict[int, list[int]] = {}
    if draw(st.booleans()):
        for rank in draw(st.permutations(range(len(speeds)))):
            racks.setdefault(draw(st.integers(0, 2)), []).append(rank)
    uplinks = tuple(Rack(tuple(ranks), draw(rates), draw(delays)) for ranks in racks.values())
    return Fabric(tuple(speeds), draw(delays), uplinks)


@given(fabrics())
def test_a_fabric_survives_being_written(made: Fabric) -> None:
    assert Fabric.parse(made.to_toml()) == made


def documented() -> Fabric:
    """The example in the module's docstring, so that it stays true."""
    assert fabric.__doc__ is not None
    return Fabric.parse(fabric.__doc__.split("::\n", 1)[1])


def test_the_documented_file_is_read_as_documented() -> None:
    made = documented()
    assert made.ranks == 8
    assert made.rates_bps == (1e9, 1e9, 1e9, 100e6, 1e9, 1e9, 1e9, 1e9)
    assert made.delay_s == 100e-6
    assert made.racks == (Rack((0, 1, 2, 3), 200e6, 5e-3), Rack((4, 5, 6, 7), 200e6, 0.0))


@pytest.mark.parametrize(
    ("source", "target", "bps", "seconds"),
    [
        (0, 1, 1e9, 100e-6),
        (0, 3, 100e6, 100e-6),
        (0, 4, 200e6, 5.1e-3),
        (3, 4, 100e6, 5.1e-3),
        (4, 5, 1e9, 100e-6),
        (2, 2, math.inf, 0.0),
    ],
)
def test_a_path_is_as_slow_as_its_slowest_link(source: int, target: int, bps: float, seconds: float) -> None:
    made = documented()
    assert made.path_rate_bps(source, target) == bps
    assert made.path_delay_s(source, target) == pytest.approx(seconds)


def test_a_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "net.toml"
    path.write_text('ranks = 2\nrate = "10mbit"\n')
    assert Fabric.from_toml(path) == Fabric.uniform(2, "10mbit")
    path.write_text("ranks = none")
    with pytest.raises(DistcompError, match=r"net\.toml: this is not TOML"):
        Fabric.from_toml(path)
    with pytest.raises(DistcompError, match=r"missing\.toml cannot be read"):
        Fabric.from_toml(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "how many ranks"),
        ("ranks = 0", "1 or more"),
        ("ranks = true", "1 or more"),
        ('ranks = 2\nrats = "1mbit"', "did you mean 'rate"),
        ("ranks = 2\nrate = [1]", "is a list"),
        ('ranks = 2\n[rates]\n2 = "1mbit"', "ranks are 0 to 1"),
        ('ranks = 2\n[rates]\n-1 = "1mbit"', "ranks are 0 to 1"),
        ("ranks = 2\nrates = 3", r"write \[rates\]"),
        ("ranks = 2\n[rack]\nranks = [0, 1]", "two brackets"),
        ("ranks = 2\n[[rack]]\nrank = [0, 1]", "did you mean 'ranks'"),
        ("ranks = 2\n[[rack]]\nranks = 2", "must list its ranks"),
        ("ranks = 2\n[[rack]]\nranks = [0]", "rank 1 is in no rack"),
        ("ranks = 2\n[[rack]]\nranks = [0, 2]", "rank 2, which does not exist"),
        ("ranks = 2\n[[rack]]\nranks = [0, 1]\n[[rack]]\nranks = [1]", "rank 1 is in two racks"),
        ("ranks = 2\n[[rack]]\nranks = [0, 1]\n[[rack]]\nranks = []", "a rack is empty"),
    ],
)
def test_a_fabric_that_makes_no_sense_is_an_error_that_says_so(text: str, sentence: str) -> None:
    with pytest.raises(DistcompError, match=sentence):
        Fabric.parse(text)


def test_a_fabric_made_in_python_is_checked_too() -> None:
    for broken in ({"rates_bps": ()}, {"rates_bps": (1.0, -1.0)}, {"rates_bps": (1.0,), "delay_s": math.nan}):
        with pytest.raises(DistcompError):
            Fabric(**broken)  # type: ignore[arg-type]
