"""The norm of a gradient whose experts lie on several ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distcomp.attaching.target import is_of_rank
from distcomp.calls import all_reduce
from distcomp.transports.types import ProcessGroup


def clip_experts_grad_norm_(
    model: nn.Module, max_norm: float, parallel: ProcessGroup | None = None
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of a model whose experts are spread over the ranks of ``parallel``.

    ::

        norm^2 = sum over ranks |gradients of the rank's own experts|^2 + |gradients that all have|^2
        g     <- g min(1, max_norm / norm)

    It is the norm of one process with all experts, so all ranks scale alike; ``clip_grad_norm_`` sees a
    rank's own experts alone, scales shared gradients by another factor on each rank, and replicas part. Call
    it on every rank. Bytes: an all-reduce of one number.

    ``parallel``: that of the mixtures; None is all ranks. Returns the norm before it was clipped.

    Raises DistcompError and PeerLost as :func:`distcomp.calls.all_reduce` does.
    """
    held: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])  # by all, by this rank
    for parameter in model.parameters():
        if parameter.grad is not None:
            held[is_of_rank(parameter)].append(parameter)
    shared, own = (_norm(part).square() for part in held)
    summed = own.reshape(1).cpu()
    all_reduce(summed, op="sum", group=parallel)
    total = torch.sqrt(summed.squeeze(0).to(shared.device) + shared)
    for part in held:
        clip_grads_with_norm_(part, max_norm, total)
    return total


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
