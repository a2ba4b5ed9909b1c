"""What a method does over many steps: unbiased ones are unbiased, nothing owed is lost, training works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distcomp.compressors import Compressor
from distcomp.layout import Layout
from distcomp.methods import ErrorFeedback, Method
from distcomp.methods.base import cut_state
from tests.buffers import ORDINARY, draw
from tests.conformance.subjects import Subject, default_methods, inside, methods
from tests.lockstep import converse, once

DRAWS = 100


def claims_to_be_unbiased(subject: Subject) -> bool:
    assert subject.entry is not None
    return not subject.entry.biased and all(c.unbiased for c in inside(subject.build(), Compressor))


def estimates(method: Method, xs: list[Tensor], draws: int) -> Tensor:
    """Estimates of the same mean with fresh randomness in each row."""
    return torch.stack([once(method, xs, step=step).estimate for step in range(draws)]).double()


@pytest.mark.parametrize("subject", list(filter(claims_to_be_unbiased, methods())), ids=str)
def test_the_estimates_of_an_unbiased_method_scatter_around_the_mean(subject: Subject) -> None:
    """The mean of T draws misses by a T-th of the scatter; 3 times that is out of reach without a bias.

    With k independent errors the ratio is a chi-square of k over k: beyond 3 with a chance of 1e-6 at k = 20,
    and here k is in the hundreds. A bias of a fifth of the scatter makes it 3 or more.
    """
    xs = draw(2)
    error = estimates(subject.build(), xs, DRAWS) - torch.stack(xs).double().mean(0)
    scatter = float(error.square().sum(1).mean())
    missed = float(error.mean(0).square().sum())
    floor = 1e-12 * float(torch.stack(xs).double().mean(0).square().sum())
    assert missed <= 3 * scatter / DRAWS + floor


@pytest.mark.parametrize("subject", list(filter(claims_to_be_unbiased, methods())), ids=str)
def test_what_is_unbiased_and_not_exact_is_random_and_anew_in_each_step(subject: Subject) -> None:
    xs = draw(2)
    drawn = estimates(subject.build(), xs, 3)
    exact = torch.allclose(drawn[0], torch.stack(xs).double().mean(0), rtol=1e-5, atol=1e-6)
    assert exact or not torch.equal(drawn[0], drawn[1])
    assert exact or not torch.equal(drawn[1], drawn[2])


def owes_all(method: Method) -> bool:
    """Whether what is not sent is owed in full."""
    return any(one.decay == one.beta == 1 for one in inside(method, ErrorFeedback))


def owes_gradients(subject: Subject) -> bool:
    assert subject.entry is not None
    return owes_all(subject.build()) and not subject.entry.direction


@pytest.mark.parametrize("subject", list(filter(owes_gradients, methods())), ids=str)
def test_what_was_sent_and_what_is_owed_is_what_came_in(subject: Subject) -> None:
    """sum_t n estimate_t + sum_i e_i = sum_t sum_i x_i, for each parameter."""
    method, size, steps = subject.build(), 3, 12
    states = [method.init(ORDINARY) for _ in range(size)]
    came = torch.zeros(ORDINARY.numel, dtype=torch.float64)
    sent = came.clone()
    moved = 0.0
    for step in range(steps):
        xs = draw(size, seed=step)
        round_ = converse(method, xs, states, step=step)
        states = round_.states
        came += torch.stack(xs).double().sum(0)
        sent += size * round_.estimate.double()
        moved += float(size * round_.estimate.abs().max()) * (1 + size * round_.rounding / 1e-6)
    residual, found = torch.zeros_like(came), 0
    for state in states:
        cut = cut_state(state)
        for param, piece in ORDINARY.pieces(residual):
            for path, leaf in cut.get(param.name, {}).items():
                if path.endswith("residual"):
                    piece += leaf.double()
                    found += 1
    assert found, "no residual was kept"
    assert float((sent + residual - came).abs().max()) <= 1e-6 * (moved + float(came.abs().max()))


class Tiny(nn.Module):
    """A net with a matrix, a bias, a norm and an embedding's worth of roles: 1,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def train(method: Method, size: int, steps: int) -> tuple[list[Tiny], list[float]]:
    """Data-parallel SGD on a fixed random teacher; the replicas and the mean loss of each step."""
    torch.manual_seed(0)
    teacher = torch.randn(8, 4)
    replicas = [Tiny() for _ in range(size)]
    for replica in replicas:
        replica.load_state_dict(replicas[0].state_dict())
    layout = Layout.of(
        [(name, tuple(p.shape)) for name, p in replicas[0].named_parameters()],
        roles={"norm.weight": "norm", "norm.bias": "norm"},
    )
    states = [method.init(layout) for _ in range(size)]
    losses = []
    for step in range(steps):
        buffers, loss = [], 0.0
        for replica in replicas:
            x = torch.randn(16, 8)
            error = nn.functional.cross_entropy(replica(x), (x @ teacher).argmax(1))
            replica.zero_grad()
            error.backward()
            buffers.append(torch.cat([p.grad.reshape(-1) for p in replica.parameters()]))
            loss += error.item() / size
        round_ = converse(method, buffers, states, layout, step)
        states = round_.states
        for replica, estimate in zip(replicas, round_.estimates, strict=True):
            with torch.no_grad():
                for p, (_, piece) in zip(replica.parameters(), layout.pieces(estimate), strict=True):
                    p -= 0.1 * piece.view_as(p)
        losses.append(loss)
    return replicas, losses


@pytest.mark.parametrize("subject", default_methods(), ids=str)
def test_replicas_are_identical_after_200_steps_and_have_learnt(subject: Subject) -> None:
    replicas, losses = train(subject.build(), size=3, steps=200)
    for replica in replicas[1:]:
        for mine, first in zip(replica.parameters(), replicas[0].parameters(), strict=True):
            assert torch.equal(mine, first)
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


PROBLEM = Layout.of([("w", (2, 4)), ("b", (5,)), ("c", (2, 3, 1, 1))])
"""Small, so that a method that sends one value in a hundred of a matrix sends one of a few here."""


@pytest.mark.parametrize("subject", default_methods(), ids=str)
def test_a_convex_problem_is_solved(subject: Subject) -> None:
    """Worker i pulls towards its own c_i; the optimum is their mean, where no worker's gradient is zero.

    What is biased and owes nothing finds a point between the c_i, if not their mean: it is given c_i that
    differ by little, and more time: signs alone move a large coordinate no faster than a small one.
    """
    method, size, steps = subject.build(), 3, 200
    exact = claims_to_be_unbiased(subject) or owes_all(method)
    centres = draw(size, PROBLEM, seed=5, scale=1.0 if exact else 0.05)
    optimum = torch.stack(centres).mean(0)
    w = optimum + 2 * draw(1, PROBLEM, seed=6)[0]
    start = float((w - optimum).norm())
    states = [method.init(PROBLEM) for _ in range(size)]
    for step in range(steps):
        round_ = converse(method, [w - centre for centre in centres], states, PROBLEM, step)
        states = round_.states
        w = w - round_.estimate * (4.0 / (step + 16))
    assert float((w - optimum).norm()) <= (0.05 if exact else 0.25) * start
