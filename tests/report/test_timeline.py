"""Seconds of a phase: time, not the sum of what ran at the same time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distcomp.runtime.pipeline import PhaseSpan, Timeline

SPANS = st.lists(
    st.tuples(st.sampled_from(["wait", "wire"]), st.integers(0, 30), st.integers(0, 10)), max_size=12
)


@given(SPANS, st.integers(0, 40))
def test_seconds_are_the_moments_at_which_the_phase_was_under_way(
    spans: list[tuple[str, int, int]], after: int
) -> None:
    timeline = Timeline(
        [PhaseSpan(phase, float(begin), float(begin + length)) for phase, begin, length in spans]
    )
    for phase in ("wait", "wire"):
        moments = {
            moment
            for name, begin, length in spans
            for moment in range(begin, begin + length)
            if name == phase and moment >= after
        }
        assert timeline.seconds(phase, float(after)) == len(moments)
