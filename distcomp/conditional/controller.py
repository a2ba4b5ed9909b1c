"""D2NN: a controller learns by rewards which of several modules an example is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distcomp.conditional.noise import generator_of
from distcomp.errors import DistcompError


class QController(nn.Module):
    """One of several modules for each example, chosen by the reward that it is expected to bring.

    ::

        Q = MLP(h),   a = argmax Q, or any with probability epsilon (training)
        r = lambda [a's answer is right] - (1 - lambda) cost_a
        L = CE(z_a, y) + (Q_a - r)^2

    Each module runs on the rows that chose it. Decisions are per example, so they say nothing about the wire.

    Args:
        width: of h, the input of the controller and of the modules.
        choices: modules that give scores.
        costs: what each costs, in [0, 1]; multiplications as a share of the dearest, for instance.
        trade: lambda, what accuracy is worth against cost.

    Source: Liu and Deng, "Dynamic Deep Neural Networks", AAAI 2018 (Q-learning with epsilon-greedy choices).
    We differ: one decision, so there is no later state to bootstrap from.

    Raises DistcompError for costs that are not one for each choice, or a trade outside [0, 1].
    """

    def __init__(
        self, width: int, choices: Sequence[nn.Module], costs: Sequence[float], trade: float = 0.8
    ) -> None:
        super().__init__()
        if len(costs) != len(choices) or not choices:
            raise DistcompError(f"{len(choices)} choices have {len(costs)} costs; give each one")
        if not 0 <= trade <= 1:
            raise DistcompError(f"accuracy is worth a share in [0, 1] of the reward, not {trade}")
        self.choices = nn.ModuleList(choices)
        self.costs, self.trade = tuple(costs), trade
        self.value = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, len(choices)))
        self.epsilon = 1.0
        """How often a choice is made at random in training; lower it over the run."""
        self.chosen = torch.empty(0, dtype=torch.int64)
        """What each example of the last forward was given."""
        self._expected = torch.empty(0, dtype=torch.float32)

    def forward(self, h: Tensor) -> Tensor:
        """``h``: ``[N, width]``; the scores of what was chosen for each row."""
        values = self.value(h.detach())
        self.chosen = values.detach().argmax(1)
        if self.training and self.epsilon > 0:
            generator = generator_of("controller", h, *self.value[0].parameters())
            explores = torch.rand(len(h), generator=generator, dtype=torch.float32) < self.epsilon
            anything = torch.randint(len(self.choices), (len(h),), generator=generator)
            self.chosen = torch.where(explores.to(h.device), anything.to(h.device), self.chosen)
        self._expected = values.gather(1, self.chosen[:, None]).squeeze(1)
        return run_on_rows(self.choices, h, self.chosen)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The task's loss and the controller's, of the forward that gave ``scores``."""
        with torch.no_grad():
            right = (scores.argmax(1) == labels).to(scores.dtype)
            cost = torch.tensor(self.costs, dtype=scores.dtype, device=scores.device)[self.chosen]
            reward = self.trade * right - (1 - self.trade) * cost
        return cross_entropy(scores, labels) + (self._expected - reward).square().mean()


def run_on_rows(modules: Sequence[nn.Module] | nn.ModuleList, x: Tensor, chosen: Tensor) -> Tensor:
    """Each module's answers to the rows that chose it, in the rows' places. All modules take part in the
    graph."""
    rows = [(chosen == number).nonzero().squeeze(1) for number in range(len(modules))]
    answers = torch.cat([module(x[own]) for module, own in zip(modules, rows, strict=True)])
    back = torch.cat(rows)
    place = torch.empty_like(back).scatter_(0, back, torch.arange(len(back), device=back.device))
    return answers[place]
