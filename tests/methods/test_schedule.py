"""A schedule is a value and a function of the step only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcomp.errors import DistcompError
from distcomp.schedule import Schedule, at, extremes, varying, whole

steps = st.integers(0, 10_000)
points = st.lists(
    st.tuples(steps, st.integers(1, 1000)), min_size=1, max_size=6, unique_by=lambda point: point[0]
).map(lambda found: tuple(sorted(found)))
schedules = st.builds(Schedule, points, st.sampled_from(["step", "linear", "geometric"]))


def test_values_hold_run_straight_or_run_by_a_factor() -> None:
    hold = Schedule(((0, 8), (10, 4), (20, 2)))
    assert [hold(step) for step in (0, 9, 10, 19, 20, 10**9)] == [8, 8, 4, 4, 2, 2]
    straight = Schedule(((0, 4), (100, 8)), "linear")
    assert [straight(step) for step in (0, 25, 50, 100, 101)] == [4, 5, 6, 8, 8]
    factor = Schedule(((0, 1.0), (4, 16.0)), "geometric")
    assert [factor(step) for step in range(6)] == pytest.approx([1, 2, 4, 8, 16, 16])


@given(schedules, steps)
def test_it_never_leaves_the_range_of_its_points_and_meets_each(schedule: Schedule, step: int) -> None:
    low, high = extremes(schedule)
    assert low * (1 - 1e-12) <= schedule(step) <= high * (1 + 1e-12)
    assert [schedule(begin) for begin, _ in schedule.points] == [value for _, value in schedule.points]


@given(schedules)
def test_its_repr_and_its_text_give_it_back(schedule: Schedule) -> None:
    assert eval(repr(schedule)) == schedule
    first = schedule.points[0][1]
    from_zero = Schedule(((0, first), *schedule.points[1:]), schedule.shape)
    again = Schedule.parse(str(schedule))
    assert again.points == from_zero.points
    assert again.shape == schedule.shape or len(schedule.points) == 1


@pytest.mark.parametrize(
    "text", ["", "x", "8 -> 4", "8 -> 4 @ x", "8 -> 4 @ 10 ~> 2 @ 20", "8 -> 4 @ 0", "0 *> 1 @ 5"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(DistcompError):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "given",
    [
        ((),),
        (((5, 1), (5, 2)),),
        (((0, float("nan")),),),
        (((0, 1),), "wavy"),
        (((0, 0.0), (9, 1.0)), "geometric"),
    ],
)
def test_impossible_points_are_refused(given: tuple[object, ...]) -> None:
    with pytest.raises(DistcompError):
        Schedule(*given)


def test_a_plain_number_serves_wherever_a_schedule_does() -> None:
    assert at(3, 10**6) == 3
    assert whole(2.5, 0) == 3
    assert extremes(7) == (7, 7)
    assert varying(4) == 4
    assert varying("4") == Schedule(((0, 4),))
    assert whole(varying("8 ~> 1 @ 7"), 3) == 5
