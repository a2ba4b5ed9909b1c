"""The papers' formulas on tensors: nothing here knows a module, a step or a rank.

Logits are ``[..., classes]``, features ``[batch, channels, ...]``. Every result is a number, a mean over the
rows, and has a gradient for the student alone where the caller has detached the teacher's side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from distcomp.errors import DistcompError
from distcomp.randomness import Key

UNLABELLED = -1
"""The label of a row that has none."""


def labelled_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean of ``-log softmax(z)[y]`` over the rows that have a label; 0 where none has.

    ``smoothing`` s: the target is ``(1-s) onehot(y) + s/classes`` (Szegedy et al., 2016), a control.
    """
    flat, rows = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    total = functional.cross_entropy(
        flat, rows, ignore_index=UNLABELLED, reduction="sum", label_smoothing=smoothing
    )
    # Not the mean of cross_entropy: of no row at all it is NaN, and some batches may have none with a label.
    return total / (rows != UNLABELLED).sum().clamp(min=1)


def mixed_targets(
    members: Sequence[Tensor], shares: Sequence[float], temperature: float, mean: str
) -> Tensor:
    """What several teachers say together at a temperature: probabilities, ``[..., classes]``.

    ::

        arithmetic   p = sum_k w_k softmax(z_k / T)
        geometric    p = softmax(sum_k w_k z_k / T)

    Source: Hinton et al., 2015, section 2. Of one teacher both are its softmax.
    """
    if mean == "arithmetic":
        softened = [w * (z / temperature).softmax(-1) for w, z in zip(shares, members, strict=True)]
        return torch.stack(softened).sum(0)
    weighted_logits = [w * z for w, z in zip(shares, members, strict=True)]
    return (torch.stack(weighted_logits).sum(0) / temperature).softmax(-1)


def softened_kl(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``T^2 mean over rows of sum_c p_c (log p_c - log softmax(z / T)_c)``; ``targets``: p, at the same T.

    ``T^2`` keeps the gradient's size, which falls with ``1/T^2`` (Hinton et al., 2015, section 2.1).
    """
    log_q = (logits / temperature).log_softmax(-1)
    per_row = (torch.xlogy(targets, targets) - targets * log_q).sum(-1)
    return temperature**2 * per_row.mean()


def centred(logits: Tensor) -> Tensor:
    """Logits less their mean over the classes: a softmax does not see the difference, a regression does."""
    return logits - logits.mean(-1, keepdim=True)


def mimic_error(logits: Tensor, targets: Tensor) -> Tensor:
    """``1/2 mean((z - target)^2)`` over rows and classes (Ba and Caruana, NIPS 2014, equation 2)."""
    return 0.5 * (logits - targets).square().mean()


def noisy_logits(logits: Tensor, share: float, sigma: float, key: Key) -> Tensor:
    """``z (1 + xi)``, ``xi ~ N(0, sigma^2)`` per logit, in a random ``share`` of the rows.

    Source: Sau and Balasubramanian, Deep model compression: distilling knowledge from noisy teachers, 2016.
    """
    generator = key.generator()
    rows = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float32) < share
    xi = sigma * torch.randn(logits.shape, generator=generator, dtype=torch.float32)
    xi = torch.where(rows.unsqueeze(-1), xi, 0.0)
    return logits * (1 + xi.to(logits.device, logits.dtype))


def hint_error(guided: Tensor, hint: Tensor) -> Tensor:
    """``1/2 mean over rows of |guided - hint|^2`` (FitNets, Romero et al., ICLR 2015, equation 3).

    Raises DistcompError where the shapes differ: a regressor must bring the student's to the teacher's.
    """
    if guided.shape != hint.shape:
        raise DistcompError(
            f"the regressor gives {tuple(guided.shape)} and the hint is {tuple(hint.shape)}; give one that "
            "brings the guided layer to the hint's shape (distcomp.distill.regressor makes it)"
        )
    return 0.5 * (guided - hint).flatten(1).square().sum(1).mean()


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: ``normalize(mean_c f_c^2)``, of norm 1 in each row; ``[batch, places]``.

    Source: Zagoruyko and Komodakis, ICLR 2017, with the mean for the sum, which the norm takes out.

    Raises DistcompError for features without places.
    """
    if features.dim() < 3:
        raise DistcompError(
            f"attention transfer compares maps [batch, channels, places...], and these features are "
            f"{tuple(features.shape)}; name a convolution's output, or use a hint"
        )
    return functional.normalize(features.square().mean(1).flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean((at_s - at_t)^2)`` of two feature maps with as many places.

    Raises DistcompError where they have not.
    """
    ours, theirs = attention_map(student), attention_map(teacher)
    if ours.shape != theirs.shape:
        raise DistcompError(
            f"the student's map is {tuple(student.shape[2:])} and the teacher's {tuple(teacher.shape[2:])}; "
            "name layers whose maps have the same height and width"
        )
    return (ours - theirs).square().mean()


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean |normalize(F_t) - normalize(F_s)|``, factors flattened and of norm 1 in each row.

    Source: Kim et al., Paraphrasing complex network: network compression via factor transfer, NeurIPS 2018,
    with p = 1.

    Raises DistcompError where the factors differ in shape.
    """
    if student.shape != teacher.shape:
        raise DistcompError(
            f"the translator gives {tuple(student.shape)} and the paraphraser {tuple(teacher.shape)}; make "
            "both with as many factors, on layers of the same height and width"
        )
    ours, theirs = (functional.normalize(f.flatten(1), dim=1) for f in (student, teacher))
    return (theirs - ours).abs().mean()
