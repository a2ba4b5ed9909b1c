"""Early conversion: train dense for a while, then go on with a structure, optimizer state and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.parametrize import parameters
from distcomp.parametrize.chain import chains
from distcomp.parametrize.links import passed
from distcomp.pruning.masks import unwrapped
from distcomp.randomness import Key

MOMENTS = ("momentum_buffer", "exp_avg")
"""What optimizers keep that is a mean of gradients: it is pulled back as a gradient is."""
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""What they keep that is a mean of squared gradients."""
DRAWS = 32


def restructure(
    model: nn.Module, optimizer: Optimizer, change: Callable[[nn.Module], Any], *, seed: int = 0
) -> None:
    """Change the parametrizations of a model in training, and let its optimizer go on with what it remembers.

    ``change(model)`` installs structures: ``lambda m: circulant(m, 8)``. The optimizer's groups then hold the
    new parameters in the old ones' places. Its state is projected: means of gradients by the transposed
    Jacobian of ``decode`` (what backward does to gradients), means of squares by the transposed Jacobian's
    squares, estimated from 32 seeded draws of signs, alike on all ranks; other tensors of a weight's shape
    are refused.

    A DistributedDataParallel knows the old parameters: hand over the plain model (``ddp.module``) after
    ``handle.detach()``, then wrap and attach anew::

        handle.detach()
        restructure(ddp.module, optimizer, lambda m: circulant(m, 8))
        ddp = DistributedDataParallel(ddp.module)
        handle = distcomp.attach(ddp, optimizer, "qsgd:bits=4")

    Source: the point of conversion is a choice of ours; Kim et al. 2016 convert after training.

    Raises DistcompError, before the optimizer has changed, for state that cannot be projected.
    """
    if unwrapped(model) is not model:
        raise DistcompError(
            "DistributedDataParallel would not know the new parameters; hand over the plain model "
            "inside, then wrap "
            "and attach anew"
        )
    before = dict(model.named_parameters())
    plain = {_plain(name): parameter for name, parameter in before.items()}
    _check_state(optimizer, before)
    change(model)
    for _, _, described in chains(model):
        theta = parameters(model, described.name)
        old = plain.get(described.name)
        if old is None or (len(theta) == 1 and theta[0] is old):
            continue
        _exchange_parameters(optimizer, old, theta)
        state = optimizer.state.pop(old, None)
        if state:
            key = Key.of("restructure", seed, described.name)
            for position, new in enumerate(theta):
                optimizer.state[new] = _projected(state, old, described.links, theta, position, key)


def _plain(name: str) -> str:
    return name.removesuffix(".original").replace("parametrizations.", "")


def _check_state(optimizer: Optimizer, before: dict[str, Parameter]) -> None:
    for name, parameter in before.items():
        for kept, value in optimizer.state.get(parameter, {}).items():
            shaped = isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
            if shaped and kept not in MOMENTS + SQUARES:
                raise DistcompError(
                    f"{type(optimizer).__name__} keeps {kept!r} of {name}, which has no projection here; "
                    "convert before the first step, or train with SGD or Adam"
                )


def _exchange_parameters(optimizer: Optimizer, old: Parameter, new: tuple[Parameter, ...]) -> None:
    for group in optimizer.param_groups:
        places = [position for position, parameter in enumerate(group["params"]) if parameter is old]
        for position in places:
            group["params"][position : position + 1] = list(new)


def _projected(
    state: dict[str, Any],
    old: Parameter,
    links: tuple[nn.Module, ...],
    theta: tuple[Parameter, ...],
    position: int,
    key: Key,
) -> dict[str, Any]:
    """The state of one tensor of theta, from that of the weight."""
    projected: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != old.shape or value.dim() == 0:
            projected[name] = value.clone() if isinstance(value, Tensor) else value
        elif name in MOMENTS:
            projected[name] = pulled_back(links, theta, value)[position]
        else:
            projected[name] = _pulled_back_squares(links, theta, value, key)[position]
    return projected


def pulled_back(
    links: tuple[nn.Module, ...], theta: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor, ...]:
    """What backward makes of a gradient of the weight: ``J^T gradient``, for each tensor of theta."""
    with torch.enable_grad():
        leaves = tuple(tensor.detach().requires_grad_() for tensor in theta)
        weight = passed(links, leaves)[0]
        return torch.autograd.grad(weight, leaves, gradient.to(weight))


def _pulled_back_squares(
    links: tuple[nn.Module, ...], theta: tuple[Tensor, ...], squares: Tensor, key: Key
) -> tuple[Tensor, ...]:
    """``(J o J)^T squares``: the mean over random signs e of ``(J^T (e sqrt(squares)))^2``."""
    draw, root = key.generator(), squares.sqrt()
    sums = [torch.zeros_like(tensor) for tensor in theta]
    for _ in range(DRAWS):
        signs = 2.0 * torch.randint(2, tuple(root.shape), generator=draw).to(root) - 1
        for total, back in zip(sums, pulled_back(links, theta, signs * root), strict=True):
            total.add_(back.detach().square() / DRAWS)
    return tuple(sums)
