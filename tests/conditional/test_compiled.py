"""torch.compile around models with conditional layers: the same bits, and no compilation for each step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distcomp.conditional import MixtureOfExperts, balance_loss, exits, stochastic_depth

COMPILED: list[int] = []


def counting(graph, inputs):
    """A compiler that leaves graphs as they are, and counts them."""
    COMPILED.append(len(inputs))
    return graph


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    COMPILED.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.inner(x))


def trained(model, call, loss, steps):
    """Weights after some steps, and how many graphs there were halfway and at the end."""
    optimizer, graphs = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
    for step in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss(call(x), torch.arange(6) % 3).backward()
        optimizer.step()
        graphs.append(len(COMPILED))
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), graphs


def both(make, steps=16):
    """The same training, compiled or not."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, loss, extra = make()
        call = torch.compile(model, backend=counting) if compiled else model
        found.append((*trained(model, call, loss, steps), model, call, extra))
    (plain, *_), (weights, graphs, *_) = found
    assert torch.equal(weights, plain)
    assert 0 < graphs[-1] <= 5  # not one more for each decision
    return found


def test_dropped_blocks():
    def make():
        model = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(8, 3))
        depth = stochastic_depth(model, [str(number) for number in range(4)], last=0.5)
        return model, cross_entropy, depth

    (*_, plain), (*_, depth) = both(make)
    assert 16 < depth.run_layers == plain.run_layers < 64


class Expertly(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.moe, self.head = nn.Linear(8, 8), MixtureOfExperts(8, 16, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.moe(torch.tanh(self.stem(x))))


def test_experts():
    def make():
        model = Expertly()
        with torch.no_grad():
            model.moe.gate.clean.normal_(generator=torch.Generator().manual_seed(1))
        return model, lambda scores, labels: cross_entropy(scores, labels) + balance_loss(model), None

    plain, compiled = both(make)
    assert compiled[2].moe.routing == plain[2].moe.routing


def test_exits():
    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        sides = exits(model, {"1": nn.Linear(8, 3)}, (1.0, 0.3))
        return model, sides.loss, sides

    answers = []
    for *_, model, _, sides in both(make):
        model.eval()
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(99))
        sides.calibrate(x, (0.5,))
        answers.append(sides.answer(x).exits)
        assert (answers[-1] == 0).sum() == 10
    assert torch.equal(*answers)
