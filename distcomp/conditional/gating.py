"""The noisy top-k gate of the sparsely-gated mixture of experts, and the losses that balance it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distcomp.conditional.noise import generator_of
from distcomp.errors import DistcompError


@dataclass(frozen=True)
class Gates:
    """What a gate decided about T tokens and E experts."""

    chosen: Tensor
    """The k experts of each token, best first: int64 ``[T, k]``."""
    weights: Tensor
    """How much each of them counts, a softmax over the k: ``[T, k]``."""
    importance: Tensor
    """The sum of the weights by expert: ``[E]``."""
    load: Tensor
    """A smooth estimate of how many tokens each expert gets: ``[E]``."""


class NoisyTopKGate(nn.Module):
    """Choose k of E experts for each token.

    ::

        H(x)_i = (x W_g)_i + eps_i softplus((x W_n)_i)     eps ~ N(0, 1), in training only
        G(x)   = softmax over the k largest of H(x), 0 elsewhere
        load_i = sum_x Phi(((x W_g)_i - kth_excluding(H(x), k, i)) / softplus((x W_n)_i))

    ``W_g`` and ``W_n`` begin at zero, so that all experts begin alike. The noise is drawn from a key that is
    made of the tokens themselves and ``W_g``: recomputed activations and a resumed run draw the same, ranks
    with other tokens draw others.

    Source: Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017, equations 3 to 5 and appendix A.
    We differ: 0.01 is added to the softplus, so that no deviation is zero.

    Raises DistcompError unless 1 <= k <= experts.
    """

    def __init__(self, width: int, experts: int, k: int = 2, noisy: bool = True) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise DistcompError(f"a token is given to 1 to {experts} experts, not {k}; choose another k")
        self.k, self.noisy = k, noisy
        self.clean = nn.Parameter(torch.zeros(width, experts, dtype=torch.float32))
        self.noise = nn.Parameter(torch.zeros(width, experts, dtype=torch.float32)) if noisy else None

    def forward(self, x: Tensor) -> Gates:
        """``x``: ``[T, width]``."""
        clean = x @ self.clean
        if self.noise is None or not self.training:
            return _top_k(clean, clean, None, self.k)
        deviation = softplus(x @ self.noise) + 1e-2
        return _top_k(clean, clean + self.draw(x, clean) * deviation, deviation, self.k)

    def draw(self, x: Tensor, like: Tensor) -> Tensor:
        """Standard normal noise ``[T, E]``, a function of the tokens and the gate's weights."""
        noise = torch.randn(like.shape, generator=generator_of("gate", x, self.clean), dtype=torch.float32)
        return noise.to(like.device, like.dtype)


def _top_k(clean: Tensor, noisy: Tensor, deviation: Tensor | None, k: int) -> Gates:
    experts = clean.shape[1]
    values, order = noisy.topk(min(k + 1, experts), dim=1)
    chosen, weights = order[:, :k], values[:, :k].softmax(1)
    scattered = torch.zeros_like(clean).scatter(1, chosen, weights)
    if deviation is None or k == experts:
        load = (scattered > 0).to(clean.dtype).sum(0)
    else:
        load = _smooth_load(clean, noisy, deviation, values, k)
    return Gates(chosen, weights, scattered.sum(0), load)


def _smooth_load(clean: Tensor, noisy: Tensor, deviation: Tensor, values: Tensor, k: int) -> Tensor:
    """The probability that an expert is among the k best if its own noise were drawn anew, over all
    tokens."""
    among = noisy >= values[:, k - 1 : k]
    threshold = torch.where(among, values[:, k : k + 1], values[:, k - 1 : k])
    probability: Tensor = torch.special.ndtr((clean - threshold) / deviation)
    return probability.sum(0)


def squared_variation(x: Tensor) -> Tensor:
    """``CV(x)^2``, the variance over the squared mean: zero when all are alike."""
    if x.numel() <= 1:
        return x.new_zeros(())
    return x.var(unbiased=True) / (x.mean().square() + 1e-10)


def capacity_of(factor: float, tokens: int, k: int, experts: int) -> int:
    """``ceil(factor T k / E)``: how many tokens of a rank an expert takes."""
    return math.ceil(factor * tokens * k / experts)
