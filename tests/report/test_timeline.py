"""Seconds of a phase: time, not the sum of what ran at the same time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distcomp.runtime.pipeline import Timeline

SPANS = st.lists(
    st.tuples(st.sampled_from(["wait", "wire"]), st.integers(0, 30), st.integers(0, 10)), max_size=12
)


@given(SPANS, st.integers(0, 40))
def test_seconds_are_the_moments_at_which_the_phase_was_under_way(
    spans: list[tuple[str, int, int]], after: int
) -> None:
    timeline = Timeline([(phase, float(begin), float(begin + length)) for phase, begin, length in spans])
    for phase in ("wait", "wire"):
        moments = {
            context
            for name, begin, length in spans
            for context in range(begin, begin + length)
            if name == phase and context >= after
        }
        assert timeline.seconds(phase, float(after)) == len(moments)


@given(SPANS)
def test_the_wire_idles_between_its_first_and_last_request_only(spans: list[tuple[str, int, int]]) -> None:
    wire = [(begin, begin + length) for name, begin, length in spans if name == "wire"]
    timeline = Timeline([("wire", float(begin), float(end)) for begin, end in wire])
    if not wire:
        assert timeline.wire_idle_s == 0
        return
    whole = range(min(begin for begin, _ in wire), max(end for _, end in wire))
    idle = [context for context in whole if not any(begin <= context < end for begin, end in wire)]
    assert timeline.wire_idle_s == len(idle)
