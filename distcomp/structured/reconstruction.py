"""Global error reconstruction: factors of all layers are trained together to give the original's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.pruning.masks import unwrapped
from distcomp.structured.factors import low_rank
from distcomp.structured.ranks import Rank
from distcomp.structured.structure import Patterns


def reconstruct(
    model: nn.Module,
    reference: nn.Module,
    inputs: Iterable[Tensor],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> list[float]:
    """Train ``model`` to give what ``reference`` gives, on inputs without labels: mean squared error of
    outputs.

    ::

        min_theta  mean |z_model(x) - z_reference(x)|^2

    One step for each batch of ``inputs``. ``model`` may be inside DistributedDataParallel, with any method
    attached;
    ``reference`` is in ``eval()`` and learns nothing. Returns the error of each step.

    Raises DistcompError where outputs have different shapes, or there is no input.
    """
    optimizer = (make_optimizer or _adam)(
        parameter for parameter in model.parameters() if parameter.requires_grad
    )
    was_training = reference.training
    reference.eval()
    errors = []
    try:
        for x in inputs:
            with torch.no_grad():
                wanted = reference(x)
            given = model(x)
            if given.shape != wanted.shape:
                raise DistcompError(
                    f"the model gives {list(given.shape)} and the reference {list(wanted.shape)}; "
                    f"give the model that "
                    "it was made from"
                )
            error = (given - wanted).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(error.item())
    finally:
        reference.train(was_training)
    if not errors:
        raise DistcompError("there is no input to reconstruct outputs for; give batches")
    return errors


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-3)


def global_error_reconstruction(
    model: nn.Module, rank: Rank, inputs: Iterable[Tensor], *, layers: Patterns = None
) -> nn.Module:
    """Low rank for all layers at once, then :func:`reconstruct` against the model that it was.

    Layer by layer the SVD is optimal, and errors add up on the way through the network; here all factors are
    trained for the error at its end. No label is needed. Changes ``model`` in place, and returns it.

    Source: Gong et al., Compressing deep convolutional networks using vector quantization, and Yang et al.'s
    global error reconstruction (deep convolutional neural network compression via global error
    reconstruction).
    """
    reference = copy.deepcopy(unwrapped(model))
    low_rank(model, rank, layers=layers, kind="svd")
    reconstruct(model, reference, inputs)
    return model
