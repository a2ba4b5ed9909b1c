"""Models mixed with their neighbours', in one pass over all of them.

The plain-torch functions are the specification; C equals them bit for bit, and serves tensors on the CPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.tables import check_tensor


def mix(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``x_0 + sum_j w_j (x_j - x_0)``, added in the order given; ``weights`` are those of all models but the
    first. Models are float32 ``[numel]``.

    Raises DistcompError for models that are not contiguous, of one size and float32, or too few weights.
    """
    if _in_c(models, weights):
        out = memory.empty(models[0].numel())
        _mix_in_c(models, weights, out)
        return out
    total = models[0].clone()
    for model, weight in zip(models[1:], weights, strict=True):
        total.add_(model - models[0], alpha=weight)
    return total


def pull(
    x: Tensor, public: Tensor, models: Sequence[Tensor], weights: Sequence[float], gamma: float
) -> tuple[Tensor, Tensor]:
    """``y = x + gamma (mix(models) - public)``, and ``y - public``. Raises as :func:`mix` does."""
    if _in_c(models, weights, x, public):
        out, beyond = memory.empty(x.numel()), memory.empty(x.numel())
        _mix_in_c(models, weights, out, (x, public, beyond), gamma)
        return out, beyond
    pulled = x + gamma * (mix(models, weights) - public)
    return pulled, pulled - public


def _in_c(models: Sequence[Tensor], weights: Sequence[float], *others: Tensor) -> bool:
    """Whether C serves them all, once they have been looked at: it sees only addresses."""
    every = (*models, *others)
    longest = max(model.numel() for model in every)
    for model in every:
        check_tensor("values of a model", model, torch.float32, longest)
    if len(weights) != len(models) - 1:
        raise DistcompError(
            f"{len(weights)} weights were given for {len(models)} models; give one for each but the first"
        )
    return all(served_by_c(model) for model in every)


def _mix_in_c(
    models: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    pulled: tuple[Tensor, Tensor, Tensor] | None = None,
    gamma: float = 0.0,
) -> None:
    from distcomp.kernels import _cpu, cpu

    at, factors = array("Q", [model.data_ptr() for model in models]), array("f", weights)
    tables = at.buffer_info()[0], factors.buffer_info()[0]
    x, public, beyond = (one.data_ptr() for one in pulled) if pulled else (0, 0, 0)

    def run(start: int, count: int) -> None:
        span = start, start + count, out.numel()
        _cpu.mix(out.data_ptr(), *tables, len(models), span, (x, public, beyond, gamma))

    cpu.shared(run, out.numel(), 1, 4)
