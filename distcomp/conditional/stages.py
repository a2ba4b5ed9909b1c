"""Dynamic execution of residual stages: each example decides, stage by stage, whether it goes through."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distcomp.conditional.noise import generator_of
from distcomp.errors import DistcompError


class GatedStage(nn.Module):
    """``x + g(x) f(x)``, with a gate that is 0 or 1 for each example.

    ::

        s = w . pool(x) + b,   g = [s + L > 0],   L ~ Logistic(0, 1) in training, 0 in evaluation
        backward: the gradient of sigmoid(s + L) in the place of g's (straight through)
        L_rate = sum over stages (mean_i g_i - rate)^2

    In evaluation ``f`` runs on the rows that go through; in training on all, since a row that stays out tells
    its gate, too, what f would have added. Per example, so nothing about the wire.

    Args:
        branch: f, from x to its shape.
        width: channels of x, which are averaged over all later dimensions.
        bias: of the gate at the beginning; above zero, so that stages begin open.

    Source: Veit and Belongie, "Convolutional Networks with Adaptive Inference Graphs", ECCV 2018 (gates and
    target rate; their Gumbel pair is the logistic above), of residual stages instead of layers.

    Raises DistcompError for a branch that changes the shape.
    """

    def __init__(self, branch: nn.Module, width: int, bias: float = 1.0) -> None:
        super().__init__()
        self.branch = branch
        self.gate = nn.Linear(width, 1)
        nn.init.constant_(self.gate.bias, bias)
        self.taken = torch.empty(0, dtype=torch.float32)
        """Which examples went through in the last forward: 0 or 1, ``[N]``, with the gate's graph."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[N, width, ...]``."""
        pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
        scores = self.gate(pooled).squeeze(1)
        if self.training:
            uniform = torch.rand(
                len(x), generator=generator_of("stage", x, self.gate.weight), dtype=torch.float32
            )
            scores = scores + torch.logit(uniform, eps=1e-6).to(x.device, x.dtype)
        soft = torch.sigmoid(scores)
        self.taken = (scores > 0).to(x.dtype) + soft - soft.detach()
        # In training f(x) of every row is the gate's gradient, also of one that stays out.
        rows = torch.arange(len(x), device=x.device) if self.training else (scores > 0).nonzero().squeeze(1)
        out = self.branch(x[rows])
        if out.shape[1:] != x.shape[1:]:
            raise DistcompError(
                f"the branch turns {list(x.shape[1:])} into {list(out.shape[1:])}; a residual stage keeps "
                "the shape"
            )
        gates = self.taken[rows].view(-1, *[1] * (x.ndim - 1))
        return x.index_add(0, rows, out * gates)


def rate_loss(model: nn.Module, rate: float) -> Tensor:
    """``sum over stages (share of examples that went through - rate)^2``, of the last forward."""
    stages = gated_stages(model)
    return torch.stack([(stage.taken.mean() - rate).square() for stage in stages]).sum()


def taken_shares(model: nn.Module) -> list[float]:
    """The share of examples that went through each stage in the last forward."""
    return [float(stage.taken.detach().mean()) for stage in gated_stages(model)]


def gated_stages(model: nn.Module) -> list[GatedStage]:
    """All gated stages of a model, in order. Raises DistcompError where there is none."""
    stages: Iterable[GatedStage] = (part for part in model.modules() if isinstance(part, GatedStage))
    known = list(stages)
    if not known:
        raise DistcompError("the model has no GatedStage; there is nothing to hold to a rate")
    return known
