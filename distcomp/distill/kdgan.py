"""KDGAN: a classifier and a teacher distil into each other, and both try to pass for the true labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from distcomp.distill.losses import UNLABELLED, labelled_cross_entropy, softened_kl
from distcomp.errors import DistcompError
from distcomp.process_environment import read_environment
from distcomp.randomness import Key
from distcomp.schedule import Schedule, Varying, at, extremes, varying


class LabelDiscriminator(nn.Module):
    """How true a (soft) label of an example looks: a logit for each row.

    A layer of ``hidden`` units on the example, flattened, beside its label: ``[batch, inputs] , [batch,
    classes] -> [batch]``.
    """

    def __init__(self, inputs: int, classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs + classes, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, batch: Tensor, label: Tensor) -> Tensor:
        """The logit that the label is a true one."""
        score: Tensor = self.layers(torch.cat([batch.flatten(1), label], dim=1)).squeeze(1)
        return score


@dataclass(frozen=True)
class GameTerms:
    """The three players' losses; their sum may go backward at once, for none reaches another's weights."""

    classifier: Tensor
    teacher: Tensor
    discriminator: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.classifier + self.teacher + self.discriminator


class KDGAN(nn.Module):
    """Three networks as one module: wrap it, optimize it and attach to it as to any other.

    ::

        samples   c ~ Gumbel-softmax(C(x), tau),   t ~ Gumbel-softmax(T(x), tau)
        D         -log D(x, y) - a log(1 - D(x, c)) - (1-a) log(1 - D(x, t))
        C         CE(C(x), y) + a (-log D(x, c)) + b KL(T(x) | C(x))
        T         CE(T(x), y) + (1-a) (-log D(x, t)) + g KL(C(x) | T(x))

    ``alpha`` a, ``beta`` b, ``gamma`` g; ``temperature`` tau, often a schedule from 1 to 0.3. The distilling
    terms' targets are detached. Rows of label -1 take part in all but the terms of the labels.
    ``classifier`` is what is kept; the teacher may see more than it does (``privileged``).

    Source: Wang et al., KDGAN: knowledge distillation with generative adversarial networks, NeurIPS 2018. We
    differ: the classifier sees labels, too, without which it hardly learns; all three step at once.

    Raises DistcompError for weights outside their ranges.
    """

    def __init__(
        self,
        classifier: nn.Module,
        teacher: nn.Module,
        discriminator: nn.Module,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.1,
        temperature: float | str | Schedule = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._tau: Varying = varying(temperature)
        if not 0 <= alpha <= 1 or min(beta, gamma) < 0 or extremes(self._tau)[0] <= 0:
            raise DistcompError(
                "KDGAN takes alpha in [0, 1], beta and gamma of 0 or more and a temperature above 0, not "
                f"{alpha}, {beta}, {gamma} and {temperature}"
            )
        self.classifier, self.teacher, self.discriminator = classifier, teacher, discriminator
        self.alpha, self.beta, self.gamma, self.seed = alpha, beta, gamma, seed

    def forward(
        self,
        batch: Tensor,
        labels: Tensor,
        step: int,
        rank: int | None = None,
        privileged: Tensor | None = None,
    ) -> Tensor:
        """The sum of the three losses: so DistributedDataParallel sees one forward."""
        return self.terms(batch, labels, step, rank, privileged).total

    def terms(
        self,
        batch: Tensor,
        labels: Tensor,
        step: int,
        rank: int | None = None,
        privileged: Tensor | None = None,
    ) -> GameTerms:
        """Each player's loss. Noise comes from ``seed``, ``step`` (the iteration) and ``rank`` alone; this
        process's rank by default."""
        rank = read_environment().rank if rank is None else rank
        key, tau = Key.of(self.seed, step).fold("kdgan", rank), at(self._tau, step)
        zc, zt = self.classifier(batch), self.teacher(batch if privileged is None else privileged)
        samples = [relaxed(z, tau, key.fold(name)) for z, name in ((zc, "classifier"), (zt, "teacher"))]
        shares = (self.alpha, 1 - self.alpha)
        # Through the discriminator as it is, to the players: its own weights are not to learn to be fooled.
        judged = [functional.softplus(-self._judged(batch, sample)) for sample in samples]
        fooled = [share * each for share, each in zip(shares, judged, strict=True)]
        classifier = labelled_cross_entropy(zc, labels) + fooled[0].mean()
        classifier = classifier + self.beta * softened_kl(zc, zt.detach().softmax(-1), 1.0)
        teacher = labelled_cross_entropy(zt, labels) + fooled[1].mean()
        teacher = teacher + self.gamma * softened_kl(zt, zc.detach().softmax(-1), 1.0)
        return GameTerms(classifier, teacher, self._told_apart(batch, labels, samples, shares))

    def kept_after_training(self) -> tuple[nn.Module, ...]:
        """The classifier."""
        return (self.classifier,)

    def _judged(self, batch: Tensor, label: Tensor) -> Tensor:
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        score: Tensor = functional_call(self.discriminator, frozen, (batch, label))
        return score

    def _told_apart(
        self, batch: Tensor, labels: Tensor, samples: list[Tensor], shares: tuple[float, float]
    ) -> Tensor:
        """The discriminator's loss: true labels from the players' samples."""
        known = labels != UNLABELLED
        onehot = functional.one_hot(labels.clamp(min=0), samples[0].shape[-1]).to(samples[0].dtype)
        real = functional.softplus(-self.discriminator(batch, onehot)) * known
        loss: Tensor = real.sum() / known.sum().clamp(min=1)
        for share, sample in zip(shares, samples, strict=True):
            loss = loss + share * functional.softplus(self.discriminator(batch, sample.detach())).mean()
        return loss


def relaxed(logits: Tensor, temperature: float, key: Key) -> Tensor:
    """A Gumbel-softmax sample: ``softmax((log softmax(z) + g) / tau)``, ``g = -log(-log u)``, u uniform.

    Source: Jang et al., ICLR 2017. Of our own noise, so that a resumed run repeats itself.
    """
    u = torch.rand(logits.shape, generator=key.generator(), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    gumbel = -torch.log(-torch.log(u)).to(logits.device, logits.dtype)
    return ((logits.log_softmax(-1) + gumbel) / temperature).softmax(-1)
