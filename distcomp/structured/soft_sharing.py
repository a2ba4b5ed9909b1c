"""Soft weight-sharing: a mixture of Gaussians, learned together with the weights, gathers them at few
values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize import install, parameters
from distcomp.pruning.sharing import Codebook
from distcomp.structured.driver import Driver, add_gradient

AT_ONCE = 1 << 16
"""Weights whose responsibilities are in memory at a time."""


class GaussianMixturePrior(nn.Module):
    """``-log p(w) = -sum_i log sum_j pi_j N(w_i; mu_j, sigma_j^2)``, with a component fixed at zero.

    ``means [J]``, ``log_sigmas [J + 1]`` (the zero component's first), ``logits [J]``; the zero component has
    the fixed share ``zero``. Sigmas do not fall below ``floor``, so that no component collapses on a weight.
    """

    def __init__(self, weights: Tensor, components: int, zero: float, floor: float) -> None:
        super().__init__()
        low, high = float(weights.min()), float(weights.max())
        spread = float(weights.double().std().clamp(min=1e-6))
        self.zero, self.floor = zero, floor * spread
        self.means = nn.Parameter(torch.linspace(low, high, components, dtype=torch.float32))
        self.log_sigmas = nn.Parameter(
            torch.full((components + 1,), math.log(spread / 4), dtype=torch.float32)
        )
        self.logits = nn.Parameter(torch.zeros(components, dtype=torch.float32))

    def log_densities(self, weights: Tensor) -> Tensor:
        """``log pi_j N(w_i; mu_j, sigma_j)``: ``[n, J + 1]``, the zero component first."""
        sigmas = self.log_sigmas.exp().clamp(min=self.floor)
        means = torch.cat([self.means.new_zeros(1), self.means])
        shares = torch.cat(
            [
                self.logits.new_full((1,), math.log(self.zero)),
                math.log1p(-self.zero) + torch.log_softmax(self.logits, 0),
            ]
        )
        distance = (weights.flatten()[:, None] - means) / sigmas
        return shares - 0.5 * distance.square() - sigmas.log() - 0.5 * math.log(2 * math.pi)

    def forward(self, weights: Tensor) -> Tensor:
        """The negative log-likelihood."""
        pieces = torch.split(weights.flatten(), AT_ONCE)
        return -torch.stack([self.log_densities(piece).logsumexp(1).sum() for piece in pieces]).sum()

    @torch.no_grad()
    def quantized(self, weights: Tensor, merge: float) -> tuple[Tensor, Tensor]:
        """The values that remain (zero among them, rising), and for each weight the number of its value.

        A weight takes the mean of the component most responsible for it. Neighbouring components nearer than
        ``merge`` times the larger of their sigmas become one, at their shares' mean; near zero, zero.
        """
        pieces = torch.split(weights.flatten(), AT_ONCE)
        component = torch.cat([self.log_densities(piece).argmax(1) for piece in pieces])
        means = torch.cat([self.means.new_zeros(1), self.means]).tolist()
        sigmas = self.log_sigmas.exp().clamp(min=self.floor).tolist()
        members = torch.bincount(component, minlength=len(means)).tolist()
        order = sorted((j for j in range(len(means)) if members[j] or j == 0), key=lambda j: means[j])
        groups: list[list[int]] = []
        for j in order:
            near = groups and means[j] - means[groups[-1][-1]] < merge * max(
                sigmas[j], sigmas[groups[-1][-1]]
            )
            if near:
                groups[-1].append(j)
            else:
                groups.append([j])
        values, number = [], [0] * len(means)
        for position, group in enumerate(groups):
            weight = sum(members[j] for j in group)
            mean = sum(members[j] * means[j] for j in group) / max(1, weight)
            values.append(0.0 if 0 in group else mean)
            for j in group:
                number[j] = position
        codes = torch.tensor(number, dtype=torch.int64)[component.cpu()]
        return torch.tensor(values, dtype=torch.float32), codes.view(weights.shape)


class SoftSharing(Driver):
    """See :func:`soft_sharing`."""

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None,
        *,
        components: int,
        zero: float,
        strength: float,
        rates: tuple[float, float],
        floor: float,
    ) -> None:
        super().__init__(model, names)
        if components < 1 or not 0 < zero < 1 or strength < 0 or floor <= 0:
            raise DistcompError(
                "soft sharing needs components >= 1, 0 < zero < 1, strength >= 0 and floor > 0, not "
                f"{components}, {zero}, {strength}, {floor}"
            )
        self.strength = strength
        flat = self._flat()
        self.prior = GaussianMixturePrior(flat, components, zero, floor).to(flat.device)
        self._optimizer = torch.optim.Adam(
            [
                {"params": [self.prior.means], "lr": rates[0]},
                {"params": [self.prior.log_sigmas, self.prior.logits], "lr": rates[1]},
            ]
        )

    def _flat(self) -> Tensor:
        return torch.cat([weight.detach().float().flatten() for weight in self.weights().values()])

    def add(self) -> None:
        """The prior's gradient: for the weights now, for the mixture until :meth:`stepped`."""
        weights = list(self.weights().values())
        with torch.enable_grad():
            flat = self._flat().requires_grad_()
            loss = self.strength * self.prior(flat)
            gradients = torch.autograd.grad(loss, [flat, *self.prior.parameters()])
        pieces = torch.split(gradients[0], [weight.numel() for weight in weights])
        for weight, piece in zip(weights, pieces, strict=True):
            add_gradient(weight, piece.view_as(weight).to(weight.dtype))
        for parameter, gradient in zip(self.prior.parameters(), gradients[1:], strict=True):
            parameter.grad = gradient

    def stepped(self) -> None:
        """The mixture learns."""
        self._optimizer.step()

    @torch.no_grad()
    def finish(self, merge: float = 1.0) -> nn.Module:
        """Give each weight the mean of its most responsible component, and let a codebook hold the values.

        Components nearer than ``merge`` sigmas become one. The model then stores a value and codes;
        ``distcomp.pruning.compress(distcomp.pruning.plain_state(model))`` writes the values exactly, in the
        container of Deep Compression. Values are of all weights together, those of a layer stand in its own
        codebook. Returns the model.
        """
        self.detach()
        values, numbers = self.prior.quantized(self._flat(), merge)
        start = 0
        for name in self.names:
            weight = parameters(self.model, name)[0]
            mine = values[numbers[start : start + weight.numel()]].view(weight.shape)
            start += weight.numel()
            weight.copy_(mine.to(weight))
            if bool(mine.any()):
                install(self.model, name, Codebook.of(weight.detach(), len(values)))
        return self.model

    def entropy_bits(self, merge: float = 1.0) -> float:
        """Bits a weight that an ideal code would take for what :meth:`finish` would leave."""
        counts = torch.bincount(self.prior.quantized(self._flat(), merge)[1]).double().numpy()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return {
            "iteration": self.iteration,
            "prior": {name: value.clone() for name, value in self.prior.state_dict().items()},
            "floor": self.prior.floor,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.iteration = int(state["iteration"])
        self.prior.load_state_dict(state["prior"])
        self.prior.floor = float(state["floor"])
        self._optimizer.load_state_dict(state["optimizer"])


def soft_sharing(
    model: nn.Module,
    *,
    components: int = 16,
    zero: float = 0.99,
    strength: float = 1e-4,
    rates: tuple[float, float] = (1e-3, 5e-3),
    floor: float = 1e-2,
    names: Iterable[str] | None = None,
) -> SoftSharing:
    """Retrain a trained model under a prior that gathers its weights at few values, zero above all.

    ::

        loss + strength (-sum_i log sum_j pi_j N(w_i; mu_j, sigma_j))

    ``components`` are free (means equally spaced over the weights at first), one more stands at zero with the
    fixed share ``zero``. ``rates``: of the means, and of the logarithms of sigmas and shares, by Adam.
    ``floor``: the least sigma, in standard deviations of the weights at the start. Then ``.finish()``.

    Wire: nothing. The prior is a function of the weights, which all ranks have alike; its gradient is added
    after the exchange. FSDP shards weights, and is not supported.

    Source: Nowlan and Hinton 1992; Ullrich et al., Soft weight-sharing for neural network compression, ICLR
    2017. We differ: a floor of the sigmas in place of their Gamma hyper-priors.

    Raises DistcompError for numbers out of range and weights that are described by something already.
    """
    return SoftSharing(
        model, names, components=components, zero=zero, strength=strength, rates=rates, floor=floor
    )
