"""What a student is asked for: the papers' losses as values, which may be added.

>>> loss = hinton(temperature=4, weight=0.5) + attention({"layer1": "layer2"}, beta=30)   # doctest: +SKIP

An :class:`Objective` names the modules that it looks at and turns what student and teacher gave into a
number. Weights and temperatures may be schedules (``"0 ~> 0.5 @ 1000"``) of the student's iterations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from distcomp.distill.factors import Paraphraser, Translator
from distcomp.distill.losses import (
    UNLABELLED,
    attention_distance,
    centred,
    factor_distance,
    hint_error,
    labelled_cross_entropy,
    mimic_error,
    mixed_targets,
    noisy_logits,
    softened_kl,
)
from distcomp.distill.teachers import NetworkOutput
from distcomp.errors import DistcompError
from distcomp.randomness import Key
from distcomp.schedule import Schedule, Varying, at, extremes, varying

MEANS = ("arithmetic", "geometric")
"""How several teachers' probabilities are mixed."""


@dataclass(frozen=True)
class Lesson:
    """One batch: what the student and the teacher gave, the labels (-1: none), and when."""

    student: NetworkOutput
    teacher: NetworkOutput
    labels: Tensor | None
    step: int
    key: Key
    """Of this step and rank; all noise comes from it."""

    @property
    def given_labels(self) -> Tensor:
        """The labels. Raises DistcompError where there are none and the loss asks for them."""
        if self.labels is None:
            raise DistcompError(
                f"the loss uses labels, and none were given; pass them, {UNLABELLED} for a row without one, "
                "or take a loss of the teacher alone (hinton(weight=1))"
            )
        return self.labels


class Objective(ABC):
    """A loss of a lesson."""

    @abstractmethod
    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        """The terms of the loss by name, each with its weight in it; the loss is their sum."""

    def taps(self) -> tuple[tuple[str, str], ...]:
        """(student's module, teacher's module), whose outputs are looked at."""
        return ()

    def heads(self) -> Mapping[str, nn.Module]:
        """What is trained beside the student, by the student's module that it sits on."""
        return {}

    def __add__(self, other: Objective) -> Objective:
        return ObjectiveSum((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class ObjectiveSum(Objective):
    """Several losses at once.

    Raises DistcompError where two of them have a head on one module.
    """

    parts: tuple[Objective, ...]

    def __post_init__(self) -> None:
        names = [name for part in self.parts for name in part.heads()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DistcompError(
                f"two losses have a head on {twice[0]!r}; tap another module with one of them"
            )

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for part in self.parts:
            for name, term in part.terms(lesson).items():
                total[name] = total[name] + term if name in total else term
        return total

    def taps(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys(pair for part in self.parts for pair in part.taps()))

    def heads(self) -> Mapping[str, nn.Module]:
        return {name: head for part in self.parts for name, head in part.heads().items()}


def _parts(objective: Objective) -> tuple[Objective, ...]:
    return objective.parts if isinstance(objective, ObjectiveSum) else (objective,)


@dataclass(frozen=True)
class Labels(Objective):
    """``weight CE(z_s, y)``, over the rows that have a label."""

    weight: Varying = 1.0
    smoothing: float = 0.0

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        error = labelled_cross_entropy(lesson.student.logits, lesson.given_labels, self.smoothing)
        return {"labels": at(self.weight, lesson.step) * error}


@dataclass(frozen=True)
class Softened(Objective):
    """``(1-a) CE(z_s, y) + a T^2 KL(p_t(T) | softmax(z_s / T))``."""

    temperature: Varying
    weight: Varying
    mean: str

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        T, a = at(self.temperature, lesson.step), at(self.weight, lesson.step)
        members, shares = lesson.teacher.each
        targets = mixed_targets(members, shares, T, self.mean)
        terms = {"teacher": a * softened_kl(lesson.student.logits, targets, T)}
        if a < 1:
            labels = lesson.given_labels
            terms["labels"] = (1 - a) * labelled_cross_entropy(lesson.student.logits, labels)
        return terms


def hinton(
    temperature: float | str | Schedule = 4.0,
    weight: float | str | Schedule = 0.5,
    mean: str = "arithmetic",
) -> Objective:
    """Match the teacher's softened probabilities, and the labels where there are any.

    ::

        (1-a) CE(z_s, y) + a T^2 KL(softmax(z_t / T) | softmax(z_s / T))

    ``weight`` a; ``temperature`` T. Rows with label -1 have the second term only, and the first is a mean
    over the others. ``mean``: of several teachers, ``arithmetic`` or ``geometric``.

    Source: Hinton et al., Distilling the knowledge in a neural network, 2015. We differ: the weights sum to
    1; KL in the place of the cross-entropy, whose gradient it has.

    Raises DistcompError for a temperature of 0 or less, a weight outside [0, 1], or another mean.
    """
    T, a = varying(temperature), varying(weight)
    if extremes(T)[0] <= 0 or extremes(a)[0] < 0 or extremes(a)[1] > 1 or mean not in MEANS:
        raise DistcompError(
            f"hinton takes a temperature above 0, a weight in [0, 1] and a mean of {' or '.join(MEANS)}, not "
            f"{temperature}, {weight} and {mean!r}"
        )
    return Softened(T, a, mean)


def hard_labels(weight: float | str | Schedule = 1.0, smoothing: float = 0.0) -> Objective:
    """The labels alone, without a teacher: what every table of distillation is to be compared with.

    ``smoothing``: label smoothing, the other control.
    """
    if not 0 <= smoothing < 1:
        raise DistcompError(f"label smoothing lies in [0, 1), not {smoothing}")
    return Labels(varying(weight), smoothing)


@dataclass(frozen=True)
class PseudoLabels(Objective):
    """``weight CE(z_s, argmax z_t)``: the teacher's hard labels."""

    weight: Varying

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        labels = lesson.teacher.logits.argmax(-1)
        error = labelled_cross_entropy(lesson.student.logits, labels)
        return {"teacher": at(self.weight, lesson.step) * error}


def pseudo_labels(weight: float | str | Schedule = 1.0) -> Objective:
    """The class that the teacher finds likeliest, as a label: a control that often does as well."""
    return PseudoLabels(varying(weight))


@dataclass(frozen=True)
class Mimic(Objective):
    """``weight 1/2 mean((z_s - (z_t - mu)/sigma)^2)``, ``z_t`` centred, and noisy where it is asked for."""

    weight: Varying
    mu: tuple[float, ...] | None
    sigma: tuple[float, ...] | None
    noise_share: float
    noise: float

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        targets = lesson.teacher.logits
        if self.noise:
            targets = noisy_logits(targets, self.noise_share, self.noise, lesson.key.fold("noisy teacher"))
        targets = centred(targets)
        if self.mu is not None and self.sigma is not None:
            targets = (targets - targets.new_tensor(self.mu)) / targets.new_tensor(self.sigma)
        error = mimic_error(lesson.student.logits, targets)
        return {"teacher": at(self.weight, lesson.step) * error}


def mimic(
    weight: float | str | Schedule = 1.0,
    standardised: tuple[Tensor, Tensor] | None = None,
    noise: float = 0.0,
    noise_share: float = 0.5,
) -> Objective:
    """Regress the teacher's logits, without a softmax and without labels.

    ::

        1/2 mean((z_s - t)^2),   t = (c - mu) / sigma,   c = z_t (1 + xi) less its mean over the classes

    ``standardised``: mu and sigma of each class over the transfer set (:func:`standardisation`); None leaves
    the logits as they are. ``noise`` sigma of ``xi ~ N(0, sigma^2)``, in a random ``noise_share`` of the rows
    (noisy teachers).

    Source: Ba and Caruana, Do deep nets really need to be deep?, NIPS 2014; Sau and Balasubramanian, 2016. We
    differ: the ½ and the mean over classes; centred in each row.

    Raises DistcompError for a share outside [0, 1], or negative noise.
    """
    if not 0 <= noise_share <= 1 or noise < 0:
        raise DistcompError(
            f"mimic takes a noise of 0 or more and a noise_share in [0, 1], not {noise} and {noise_share}"
        )
    mu, sigma = (None, None) if standardised is None else (tuple(t.tolist()) for t in standardised)
    return Mimic(varying(weight), mu, sigma, noise_share, noise)


@dataclass(frozen=True)
class Attention(Objective):
    """``beta sum over layers of mean((at_s - at_t)^2)``."""

    layers: tuple[tuple[str, str], ...]
    beta: Varying

    def taps(self) -> tuple[tuple[str, str], ...]:
        return self.layers

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        distances = [
            attention_distance(lesson.student.features[ours], lesson.teacher.features[theirs])
            for ours, theirs in self.layers
        ]
        return {"attention": at(self.beta, lesson.step) * sum(distances[1:], distances[0])}


def attention(layers: Mapping[str, str] | Sequence[str], beta: float | str | Schedule = 30.0) -> Objective:
    """Let the student's layers look where the teacher's do; add it to :func:`hard_labels` or to another.

    ::

        beta sum_l mean((at(s_l) - at(t_l))^2),   at(f) = normalize(mean_c f_c^2)

    ``layers``: the student's module -> the teacher's; a list where both have the same names. ``beta`` is
    to be tuned: the mean is over batch and places.

    Source: Zagoruyko and Komodakis, ICLR 2017; with cheap blocks in the teacher's architecture it is
    Moonshine (Crowley et al., NeurIPS 2018).

    Raises DistcompError where no layer is named.
    """
    pairs = tuple(layers.items() if isinstance(layers, Mapping) else ((name, name) for name in layers))
    if not pairs:
        raise DistcompError(
            "attention transfer compares layers, and none is named; give {'student': 'teacher'}"
        )
    return Attention(pairs, varying(beta))


@dataclass(frozen=True, eq=False)
class Hint(Objective):
    """``weight 1/2 mean over rows of |r(guided) - hint|^2``; ``r`` is trained with the student."""

    guided: str
    hint: str
    regressor: nn.Module = field(repr=False)
    weight: Varying = 1.0

    def taps(self) -> tuple[tuple[str, str], ...]:
        return ((self.guided, self.hint),)

    def heads(self) -> Mapping[str, nn.Module]:
        return {self.guided: self.regressor}

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        error = hint_error(lesson.student.features[self.guided], lesson.teacher.features[self.hint])
        return {"hint": at(self.weight, lesson.step) * error}


def fitnet_hint(
    guided: str, hint: str, regressor: nn.Module, weight: float | str | Schedule = 1.0
) -> Objective:
    """Stage one of FitNets: the student's module ``guided`` predicts the teacher's ``hint``.

    ::

        1/2 mean over rows of |r(v_guided(x)) - u_hint(x)|^2

    ``regressor`` r (:func:`distcomp.distill.regressor` makes one) is trained with the student and taken off
    afterwards. :func:`distcomp.distill.freeze_above` leaves to this stage what lies below the guided layer:
    the rest is neither trained nor sent. Stage two is any other loss.

    Source: Romero et al., FitNets: hints for thin deep nets, ICLR 2015.
    """
    return Hint(guided, hint, regressor, varying(weight))


@dataclass(frozen=True, eq=False)
class Factor(Objective):
    """``beta mean |normalize(P(t)) - normalize(R(s))|``, P frozen, R trained with the student."""

    student_layer: str
    teacher_layer: str
    paraphraser: Paraphraser = field(repr=False)
    translator: Translator = field(repr=False)
    beta: Varying

    def taps(self) -> tuple[tuple[str, str], ...]:
        return ((self.student_layer, self.teacher_layer),)

    def heads(self) -> Mapping[str, nn.Module]:
        return {self.student_layer: self.translator}

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        theirs = self.paraphraser.factor(lesson.teacher.features[self.teacher_layer])
        distance = factor_distance(lesson.student.features[self.student_layer], theirs)
        return {"factor": at(self.beta, lesson.step) * distance}


def factor_transfer(
    student_layer: str,
    teacher_layer: str,
    paraphraser: Paraphraser,
    translator: Translator,
    beta: float | str | Schedule = 50.0,
) -> Objective:
    """Match factors of features: the teacher's as a trained autoencoder paraphrases them; add it to a loss.

    ::

        beta mean |normalize(P(t)) - normalize(R(s))|

    ``paraphraser`` P is trained first (:func:`distcomp.distill.train_paraphraser`), then frozen;
    ``translator`` R is trained with the student. ``beta`` is to be tuned: the mean divides by the factor's
    size.

    Source: Kim et al., NeurIPS 2018, with p = 1.
    """
    return Factor(student_layer, teacher_layer, paraphraser, translator, varying(beta))
