"""What does one network learn from another?

>>> loss = distcomp.distill.hinton(temperature=4, weight=0.5)          # doctest: +SKIP
>>> teach = distcomp.distill.Distill(student, teacher, loss)           # doctest: +SKIP
>>> teach(batch, labels).backward()                                    # doctest: +SKIP

The teacher is frozen and a part of nothing; the student's gradients are exchanged by any method.
Workers that exchange predictions in the place of gradients: ``distcomp.averaging.codistill``.
"""

from distcomp.distill.cache import LogitCache, digest_of
from distcomp.distill.factors import Paraphraser, Translator, train_paraphraser
from distcomp.distill.hints import features_of, freeze_above, linear_bottleneck, regressor, standardisation
from distcomp.distill.objectives import (
    Lesson,
    Objective,
    attention,
    factor_transfer,
    fitnet_hint,
    hard_labels,
    hinton,
    mimic,
    pseudo_labels,
)
from distcomp.distill.student import Distill, DistillSummary
from distcomp.distill.taps import install_heads, remove_heads
from distcomp.distill.teachers import CachedTeacher, NetworkTeacher, Predicted, SeveralTeachers, Teacher

__all__ = [
    "CachedTeacher",
    "Distill",
    "DistillSummary",
    "Lesson",
    "LogitCache",
    "NetworkTeacher",
    "Objective",
    "Paraphraser",
    "Predicted",
    "SeveralTeachers",
    "Teacher",
    "Translator",
    "attention",
    "digest_of",
    "factor_transfer",
    "features_of",
    "fitnet_hint",
    "freeze_above",
    "hard_labels",
    "hinton",
    "install_heads",
    "linear_bottleneck",
    "mimic",
    "pseudo_labels",
    "regressor",
    "remove_heads",
    "standardisation",
    "train_paraphraser",
]
