"""SplitNet and sparse convolutions: penalties, groups that are found, cuts, proximal steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distcomp import DistcompError, structured
from distcomp.active import Planned
from distcomp.layout import Layout
from distcomp.parametrize import parameters
from distcomp.structured.split import off_diagonal
from tests.structured import oracles
from tests.structured.test_drivers import network


def test_the_penalty_off_the_diagonal_is_the_papers() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    outputs, inputs = (
        torch.softmax(torch.randn(3, n, generator=draw, dtype=torch.float64), 0) for n in (5, 7)
    )
    found = float(off_diagonal(weight, outputs, inputs))
    assert found == pytest.approx(
        oracles.off_diagonal(weight.numpy(), outputs.numpy(), inputs.numpy()), rel=1e-6
    )
    kernels = torch.stack([weight * c for c in (0.6, 0.8)], 2)  # of length |weight| over their taps
    assert float(off_diagonal(kernels, outputs, inputs)) == pytest.approx(found, rel=1e-6)


def two_worlds(step: int) -> tuple[Tensor, Tensor]:
    """Classes 0 to 2 show in inputs 0 to 5, the others in the other inputs: each by a pattern over all of its
    six."""
    pattern = torch.randn(6, 6, generator=torch.Generator().manual_seed(77))
    draw = torch.Generator().manual_seed(step)
    y = torch.randint(6, (64,), generator=draw)
    x = 0.3 * torch.randn(64, 12, generator=draw)
    x[:, :6] += pattern[y] * (y < 3)[:, None]
    x[:, 6:] += pattern[y] * (y >= 3)[:, None]
    return x, y


def test_splitnet_finds_the_groups_that_are_there() -> None:
    net = network()
    for rate, driver_of in ((0.1, None), (0.05, True)):
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
        driver = (
            structured.splitnet(net, ["0", "2"], 2, strengths=(1e-2, 1e-2, 1.0), until=150, rate=0.03)
            if driver_of
            else None
        )
        for step in range(300):
            x, y = two_worlds(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    inputs, hidden, classes = driver.assignments
    assert classes.tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    assert int((inputs == classes.repeat_interleave(2)).sum()) >= 9  # some hardly say anything
    dense = sum(p.numel() for p in net.parameters())
    driver.finish()
    assert sum(p.numel() for p in net.parameters()) < 0.75 * dense
    x, y = two_worlds(9999)
    assert float((net(x).argmax(1) == y).float().mean()) > 0.8
    assert torch.equal(net[2].weight != 0, classes[:, None] == hidden[None])


def test_layers_that_do_not_follow_each_other_are_refused() -> None:
    apart = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 7))
    with pytest.raises(DistcompError, match="does not follow"):
        structured.splitnet(apart, ["1", "0"], 2)
    with pytest.raises(DistcompError, match="2 to 256 groups"):
        structured.splitnet(network(), ["0", "2"], 1)


def test_features_of_a_flattened_channel_belong_together() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 5))
    driver = structured.splitnet(net, ["0", "2"], 2)
    driver.logits[0].data, driver.logits[1].data = torch.eye(2)[:, [0, 1, 1]], torch.eye(2)[:, [0, 1, 1, 0]]
    driver.logits[2].data = torch.eye(2)[:, [0, 1, 0, 1, 1]]
    driver.finish()
    of_input = torch.tensor([0, 1, 1, 0]).repeat_interleave(9)
    assert torch.equal(net[2].weight != 0, torch.tensor([0, 1, 0, 1, 1])[:, None] == of_input[None])


def test_groups_take_turns_and_what_belongs_to_none_is_always_sent() -> None:
    net = network()
    with pytest.raises(DistcompError, match="cut into no groups"):
        structured.groups_in_turn(net)
    driver = structured.splitnet(net, ["0", "2"], 2)
    driver.finish()
    source = structured.groups_in_turn(net)
    layout = Layout.of([(name, tuple(p.shape)) for name, p in net.named_parameters()])
    first, second, third = (set(source.active(layout, Planned(step)).layout.names) for step in (0, 1, 2))
    assert first == third
    assert first & second == {"0.bias", "2.bias"}
    assert first | second == set(layout.names)


def test_sparse_coefficients_shrink_by_rate_times_strength_and_the_weight_is_theirs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 5))
    driver = structured.sparse_convolution(net, 0.5, layers="0")
    _, coefficients, _ = (t.detach().clone() for t in parameters(net, "0.weight"))
    optimizer = torch.optim.SGD(parameters(net, "0.weight"), 0.1)
    for parameter in parameters(net, "0.weight"):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = np.sign(coefficients.numpy()) * np.maximum(np.abs(coefficients.numpy()) - 0.05, 0)
    p, s, q = (t.detach() for t in parameters(net, "0.weight"))
    np.testing.assert_allclose(s.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(p.norm(dim=0), torch.ones(3))
    torch.testing.assert_close(q.norm(dim=2), torch.ones(3, 9))
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        parameters(net, "0.weight")[0].mul_(2.0)
    for parameter in parameters(net, "0.weight"):
        parameter.grad = None
    parameters(net, "0.weight")[0].grad = torch.zeros_like(p)
    driver.strength = 1e-12
    optimizer.step()
    torch.testing.assert_close(
        net[0].weight.detach(), 2 * before, atol=1e-5, rtol=1e-4
    )  # lengths moved into S
    share = driver.freeze()
    assert share == pytest.approx(float((s == 0).float().mean()))
    zeros = parameters(net, "0.weight")[1].detach() == 0
    adam = torch.optim.Adam(net.parameters(), 0.05)
    for step in range(3):
        adam.zero_grad()
        net(torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        adam.step()
    assert not parameters(net, "0.weight")[1][zeros].any()
