"""Apprentice: a student of few bits and a teacher of full precision; over any converter of ``precision``.

Scheme A trains both together, B learns from a trained teacher, C begins with a student that was trained in
full precision. Every comparison needs the row without the teacher: the same student, the same steps,
``hard_labels()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcomp.distill.losses import labelled_cross_entropy
from distcomp.distill.objectives import Lesson, Objective
from distcomp.errors import DistcompError

Converter = Callable[[nn.Module], nn.Module]
"""Puts quantizers on a model: ``distcomp.precision.ttq``, or a lambda with its settings."""


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``H = -mean over rows of sum_c p_c log softmax(z)_c``, p the softmax of ``targets`` (logits)."""
    return -(targets.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def joint_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
    detached: bool = True,
) -> Tensor:
    """The loss of scheme A, of both networks' logits.

    ::

        alpha CE(z_T, y) + beta CE(z_A, y) + gamma H(softmax(z_T), z_A)

    ``detached``: H teaches the apprentice alone; without, the teacher is also pulled towards it.

    Source: Mishra and Marr, Apprentice: using knowledge distillation techniques to improve low-precision
    network accuracy, ICLR 2018, equation 1.
    """
    alpha, beta, gamma = weights
    taught = soft_cross_entropy(student, teacher.detach() if detached else teacher)
    labelled = alpha * labelled_cross_entropy(teacher, labels) + beta * labelled_cross_entropy(
        student, labels
    )
    return labelled + gamma * taught


class TeacherAndApprentice(nn.Module):
    """Scheme A's two networks as one module; ``forward(batch)`` gives the logits of both.

    Training sends both (:func:`distcomp.distill.summary` says how much more); ``apprentice`` is kept.
    """

    def __init__(self, teacher: nn.Module, apprentice: nn.Module, converter: Converter | None = None) -> None:
        super().__init__()
        self.teacher = teacher
        self.apprentice = apprentice if converter is None else converter(apprentice)

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """(teacher's logits, apprentice's logits)."""
        return self.teacher(batch), self.apprentice(batch)

    def kept_after_training(self) -> tuple[nn.Module, ...]:
        """The apprentice."""
        return (self.apprentice,)


@dataclass(frozen=True)
class ApprenticeLesson(Objective):
    """``beta CE(z_A, y) + gamma H(softmax(z_T), z_A)``."""

    beta: float
    gamma: float

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        logits = lesson.student.logits
        return {
            "labels": self.beta * labelled_cross_entropy(logits, lesson.given_labels),
            "teacher": self.gamma * soft_cross_entropy(logits, lesson.teacher.logits),
        }


def apprentice(beta: float = 0.5, gamma: float = 0.5) -> Objective:
    """The loss of schemes B and C, for ``Distill(student, teacher, apprentice())``; softmax on both sides.

    B: the student is converted before it is trained. C: see :func:`fine_tuned`.

    Source: Mishra and Marr, ICLR 2018. Raises DistcompError for a weight below 0.
    """
    if min(beta, gamma) < 0:
        raise DistcompError(f"apprentice takes weights of 0 or more, not {beta} and {gamma}")
    return ApprenticeLesson(beta, gamma)


def fine_tuned(
    trained: nn.Module,
    converter: Converter,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer],
    learning_rate: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Scheme C's beginning: a trained full-precision student, converted, and its optimizer at a quarter of
    the ``learning_rate`` it was trained with."""
    student = converter(trained)
    return student, optimizer(student, learning_rate / 4)
