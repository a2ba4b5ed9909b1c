"""Batch norm and AdaMax without multiplications: powers of two in the place of factors (Hubara 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.precision.noise import straight_through

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """AP2: ``sign(x) 2^round(log2 |x|)``; 0 stays 0."""
    power = torch.exp2(torch.round(torch.log2(x.abs())))
    return torch.where(x == 0, x, torch.copysign(power, x))


class ShiftBatchNorm(nn.Module):
    """Batch norm whose products are shifts.

    ::

        c = x - mean;   v = mean(c AP2(c));   y = c AP2(1 / sqrt(v + eps)) AP2(gamma) + beta

    AP2 is the nearest power of two; the gradient passes straight through it.
    Takes ``[batch, channels, ...]``.

    Source: Hubara et al., "Binarized neural networks", NeurIPS 2016, algorithm 3.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        kind = torch.get_default_dtype()  # as every layer of torch's
        self.weight = nn.Parameter(torch.ones(channels, dtype=kind))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=kind))
        self.eps, self.momentum = eps, momentum
        self.register_buffer("mean", torch.zeros(channels, dtype=kind))
        self.register_buffer("variance", torch.ones(channels, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        """The normalized input."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean = x.mean(axes) if self.training else self.mean
        c = x - mean.view(shape)
        # One factor of the square is rounded to a power of two, the other is not: a shift, not a product.
        variance = (c * _ap2(c)).mean(axes) if self.training else self.variance
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        scale = _ap2((variance + self.eps).rsqrt())
        return c * scale.view(shape) * _ap2(self.weight).view(shape) + self.bias.view(shape)


def _ap2(x: Tensor) -> Tensor:
    return straight_through(x, nearest_power_of_two(x.detach()))


def shift_norms(model: nn.Module) -> nn.Module:
    """Put a :class:`ShiftBatchNorm` in the place of every batch norm, with its numbers, in place."""
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, NORMS):
                if not child.affine or child.running_mean is None or child.momentum is None:
                    raise DistcompError(f"{name} has no scale, no running mean or no momentum; give it them")
                norm = ShiftBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight.device)
                norm.load_state_dict(
                    {
                        "weight": child.weight,
                        "bias": child.bias,
                        "mean": child.running_mean,
                        "variance": child.running_var,
                    }
                )
                setattr(parent, name, norm.train(child.training))
    return model


class ShiftAdaMax(Optimizer):
    """AdaMax whose products with step and norm are shifts.

    ::

        m = b1 m + (1 - b1) g;   v = max(b2 v, |g|);   w = w - AP2(lr / (1 - b1^t)) AP2(1 / v) m

    Source: Hubara et al., "Binarized neural networks", NeurIPS 2016, algorithm 4 (lr = 2^-10, b1 = 1 - 2^-3,
    b2 = 1 - 2^-10).
    """

    def __init__(
        self, params: Any, lr: float = 2.0**-10, betas: tuple[float, float] = (1 - 2.0**-3, 1 - 2.0**-10)
    ) -> None:
        if not (lr > 0 and all(0 <= beta < 1 for beta in betas)):
            raise DistcompError(f"a learning rate is positive and betas are in [0, 1), not {lr} and {betas}")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(w), largest=torch.zeros_like(w))
                state["step"] += 1
                state["mean"].lerp_(w.grad, 1 - b1)
                torch.maximum(state["largest"] * b2, w.grad.abs(), out=state["largest"])
                inverse = nearest_power_of_two(1 / state["largest"].clamp(min=torch.finfo(w.dtype).tiny))
                rate = nearest_power_of_two(
                    torch.tensor(group["lr"] / (1 - b1 ** state["step"]), dtype=torch.float32)
                )
                w.sub_(float(rate) * inverse * state["mean"])
        return loss
