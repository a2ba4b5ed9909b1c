"""What does one network learn from another?

>>> loss = distcomp.distill.hinton(temperature=4, weight=0.5)          # doctest: +SKIP
>>> teach = distcomp.distill.Distill(student, teacher, loss)           # doctest: +SKIP
>>> teach(batch, labels).backward()                                    # doctest: +SKIP

The teacher is frozen and a part of nothing; the student's gradients are exchanged by any method.
Workers that exchange predictions in the place of gradients: ``distcomp.averaging.codistill``.
"""

from distcomp.distill.apprentices import TeacherAndApprentice, apprentice, fine_tuned, joint_loss
from distcomp.distill.cache import LogitCache, digest_of
from distcomp.distill.factors import Paraphraser, Translator, train_paraphraser
from distcomp.distill.hints import features_of, freeze_above, linear_bottleneck, regressor, standardisation
from distcomp.distill.kdgan import KDGAN, GameTerms, LabelDiscriminator
from distcomp.distill.kept import TrainingSummary, TrainsMore, summary
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
from distcomp.distill.online import (
    Branches,
    MutualLearners,
    OnTheFlyEnsemble,
    ensemble_loss,
    mutual_loss,
    training_factor,
)
from distcomp.distill.student import Distill, DistillSummary
from distcomp.distill.taps import install_heads, remove_heads
from distcomp.distill.teachers import (
    CachedTeacher,
    KnownLogits,
    NetworkOutput,
    NetworkTeacher,
    SeveralTeachers,
    Teacher,
)

__all__ = [
    "KDGAN",
    "Branches",
    "CachedTeacher",
    "Distill",
    "DistillSummary",
    "GameTerms",
    "KnownLogits",
    "LabelDiscriminator",
    "Lesson",
    "LogitCache",
    "MutualLearners",
    "NetworkOutput",
    "NetworkTeacher",
    "Objective",
    "OnTheFlyEnsemble",
    "Paraphraser",
    "SeveralTeachers",
    "Teacher",
    "TeacherAndApprentice",
    "TrainingSummary",
    "TrainsMore",
    "Translator",
    "apprentice",
    "attention",
    "digest_of",
    "ensemble_loss",
    "factor_transfer",
    "features_of",
    "fine_tuned",
    "fitnet_hint",
    "freeze_above",
    "hard_labels",
    "hinton",
    "install_heads",
    "joint_loss",
    "linear_bottleneck",
    "mimic",
    "mutual_loss",
    "pseudo_labels",
    "regressor",
    "remove_heads",
    "standardisation",
    "summary",
    "train_paraphraser",
    "training_factor",
]
