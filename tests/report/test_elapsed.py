"""Seconds of training: from step to step, evaluations left out."""

from __future__ import annotations

from distcomp.attaching.elapsed import TrainingTime


class Clock:
    """Stands where it was put."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_loading_data_is_training_and_evaluating_is_not() -> None:
    clock = Clock()
    trained = TrainingTime(clock)
    assert trained.seconds == 0
    for forward_s, stepped_s in ((10, 13), (14, 17)):  # a second for loading between them
        clock.now_s = forward_s
        trained.forward()
        clock.now_s = stepped_s
        trained.stepped()
    assert trained.seconds == 7
    trained.interrupt()  # evaluates until 30
    clock.now_s = 30
    trained.forward()
    assert trained.seconds == 7
    clock.now_s = 32
    trained.stepped()
    assert trained.seconds == 9


def test_forwards_that_accumulate_gradients_are_one_step() -> None:
    clock = Clock()
    trained = TrainingTime(clock)
    for now_s in (0, 1, 2):
        clock.now_s = now_s
        trained.forward()
    clock.now_s = 4
    trained.stepped()
    assert trained.seconds == 4
