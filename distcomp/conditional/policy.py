"""Conditional computation in neural networks: a learned policy switches blocks of a layer's units, per
example.

Decisions are per example, so they say nothing about the wire: every parameter is active in every step, and
blocks that no example of a rank took have a gradient of zero there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcomp.conditional.noise import generator_of
from distcomp.errors import DistcompError


@dataclass(frozen=True)
class PolicyLosses:
    """What weighs how much: ``policy`` the REINFORCE term, ``sparsity`` and ``variance`` the two others."""

    policy: float = 0.1
    sparsity: float = 10.0
    variance: float = 1.0


class BlockPolicy(nn.Module):
    """A hidden layer of B blocks of units, of which each example computes those that its policy draws.

    ::

        p = sigmoid(V x + c),   u_b ~ Bernoulli(p_b),   h = (u_b relu(W_b x + b_b)) of all blocks b
        L_policy   = mean_i (loss_i - baseline) log P(u_i)                     REINFORCE, moving-average
        baseline L_sparsity = sum_b (mean_i p_ib - rate)^2 + B mean_i (mean_b p_ib - rate)^2
        L_variance = -sum_b Var_i p_ib

    Rows of each block are gathered, so a block is multiplied with the examples that take it and no others.
    Coins are drawn from a key made of the input and the policy's weights.

    Args:
        inputs, units: of the layer; units divide among ``blocks``.
        rate: the share of blocks that an example is to take, and of examples that a block is to get.

    Source: Bengio, Bacon, Pineau, Precup, "Conditional Computation in Neural Networks for Faster Models",
    2015. We differ: the policy sees the layer's own input, and p is kept within [0.02, 0.98].

    Raises DistcompError for units that do not divide, or a rate outside (0, 1).
    """

    def __init__(self, inputs: int, units: int, blocks: int, rate: float = 0.2) -> None:
        super().__init__()
        if blocks < 1 or units % blocks or not 0 < rate < 1:
            raise DistcompError(
                f"{blocks} blocks and a rate of {rate} do not fit {units} units; choose a divisor and a rate "
                "in (0, 1)"
            )
        self.blocks, self.rate = blocks, rate
        self.layer = nn.Linear(inputs, units)
        self.policy = nn.Linear(inputs, blocks)
        self.register_buffer("baseline", torch.zeros((), dtype=torch.float32))
        self.baseline: Tensor
        self.random = False
        """The control: the same share of blocks, drawn without looking at the input."""
        self.probability = torch.empty(0, blocks, dtype=torch.float32)
        """Of the last forward: ``[N, blocks]``, with its graph."""
        self.taken = torch.empty(0, blocks, dtype=torch.float32)
        """Which blocks each example took: bool ``[N, blocks]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[N, inputs]``; returns ``[N, units]``."""
        p = torch.sigmoid(self.policy(x.detach())).clamp(0.02, 0.98)
        self.probability = torch.full_like(p, self.rate) if self.random else p
        self.taken = self._coins(x) < self.probability.detach()
        return block_sparse_relu(x, self.layer.weight, self.layer.bias, self.taken)

    def _coins(self, x: Tensor) -> Tensor:
        generator = generator_of("policy", x, self.policy.weight)
        return torch.rand(len(x), self.blocks, generator=generator, dtype=torch.float32).to(x.device)

    def losses(self, task_losses: Tensor, weights: PolicyLosses | None = None) -> Tensor:
        """What is added to the mean of ``task_losses`` (``[N]``, of the last forward): the three terms above.

        A batch of one has no variance, and that term is left out.
        """
        weights = weights or PolicyLosses()
        if self.random:
            return task_losses.new_zeros(())
        p, u = self.probability, self.taken
        log_probability = torch.where(u, p.log(), (1 - p).log()).sum(1)
        with torch.no_grad():
            advantage = task_losses - self.baseline
            self.baseline.lerp_(task_losses.mean(), 0.1)
        reinforce = (advantage * log_probability).mean()
        sparsity = (p.mean(0) - self.rate).square().sum()
        sparsity = sparsity + self.blocks * (p.mean(1) - self.rate).square().mean()
        variance = -p.var(0).sum() if len(p) > 1 else p.new_zeros(())
        return weights.policy * reinforce + weights.sparsity * sparsity + weights.variance * variance

    def products(self) -> float:
        """Multiplications of an example in the last forward, on average: blocks that it took, and the
        policy."""
        inputs, units = self.layer.in_features, self.layer.out_features
        policy = 0 if self.random else inputs * self.blocks
        return float(self.taken.float().mean()) * inputs * units + policy


def block_sparse_relu(x: Tensor, weight: Tensor, bias: Tensor, taken: Tensor) -> Tensor:
    """``relu(x W' + b)`` in blocks of units, each only for the rows that take it; zero elsewhere.

    ``x``: ``[N, inputs]``, ``weight``: ``[units, inputs]``, ``taken``: bool ``[N, blocks]``. All weights
    take part in the graph, also of blocks that no row takes.
    """
    blocks = taken.shape[1]
    size = len(weight) // blocks
    rows = [taken[:, block].nonzero().squeeze(1) for block in range(blocks)]
    pieces = []
    for block, own in enumerate(rows):
        units = slice(block * size, (block + 1) * size)
        pieces.append(torch.relu(torch.addmm(bias[units], x[own], weight[units].t())))
    at = torch.cat([own * blocks + block for block, own in enumerate(rows)])
    # One place for each pair of row and block: the pieces are copied, and nothing is added up.
    out = x.new_zeros(len(x) * blocks, size).index_copy(0, at, torch.cat(pieces).to(x.dtype))
    return out.view(len(x), len(weight))
