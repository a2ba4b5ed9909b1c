"""1-bit Adam against torch's Adam and its own lines in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcomp.compressors import Quantize
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import AllGatherMean, ErrorFeedback, OneBitAdam, identity, onebit_adam, parse
from distcomp.methods.base import cut_state
from tests.buffers import ORDINARY, draw
from tests.lockstep import converse

NET = Layout.of([("w", (12, 10)), ("b", (7,))])


def trained(method: OneBitAdam, steps: int, decay: float = 0.0) -> torch.Tensor:
    """SGD on what the method returns, towards three workers' targets."""
    w = torch.nn.Parameter(torch.zeros(NET.numel))
    optimizer = torch.optim.SGD([w], lr=0.05, weight_decay=decay)
    states = [method.init(NET)] * 3
    for step in range(steps):
        xs = [(w - target).detach() for target in draw(3, NET)]
        round_ = converse(method, xs, states, NET, step)
        states, w.grad = round_.states, round_.estimate
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_while_it_warms_up_it_is_adam(decay: float) -> None:
    w = torch.nn.Parameter(torch.zeros(NET.numel))
    adam = torch.optim.AdamW([w], lr=0.05, weight_decay=decay)
    for _ in range(30):
        w.grad = torch.stack([(w - target).detach() for target in draw(3, NET)]).mean(0)
        adam.step()
    torch.testing.assert_close(trained(onebit_adam(30), 30, decay), w.detach(), atol=1e-5, rtol=1e-4)


def sign_with_mean(v: np.ndarray) -> np.ndarray:
    return np.where(v >= 0, 1, -1) * np.abs(v).mean()


def test_afterwards_it_is_the_papers_algorithm() -> None:
    """One block, payloads gathered: the server's stage is exact and each worker has its own error."""
    inner = ErrorFeedback(AllGatherMean(Quantize(1)))
    method, size, layout = OneBitAdam(inner, 3), 3, NET.select(lambda s: s.name == "w")
    states = [method.init(layout)] * size
    m, v, errors = np.zeros(120), np.zeros(120), np.zeros((size, 120))
    for step in range(8):
        xs = draw(size, layout, seed=step)
        round_ = converse(method, xs, states, layout, step)
        states = round_.states
        own = 0.9 * m + 0.1 * np.stack([x.double().numpy() for x in xs])
        if step < 3:
            m, v = own.mean(0), 0.999 * v + 0.001 * np.mean([x.double().numpy() for x in xs], axis=0) ** 2
            shares = own
        else:
            shares = np.stack([sign_with_mean(one) for one in own + errors])
            errors = own + errors - shares
            m = shares.mean(0)
        scale = (1 - 0.9 ** (step + 1)) * (np.sqrt(v / (1 - 0.999 ** min(step + 1, 3))) + 1e-8)
        np.testing.assert_allclose(round_.estimate.numpy(), m / scale, atol=2e-4, rtol=2e-4)
        for found, share in zip(round_.contributions(), shares, strict=True):
            np.testing.assert_allclose(found.numpy(), share / scale, atol=2e-4, rtol=2e-4)


def test_with_an_exact_inner_method_only_the_variance_stands_still() -> None:
    one, other = trained(OneBitAdam(identity(), 5), 12), trained(OneBitAdam(identity(), 12), 12)
    assert not torch.allclose(one, other, atol=1e-4)
    torch.testing.assert_close(one.sign(), other.sign())


def test_both_errors_are_owed_and_kept() -> None:
    """Momentum sent and momentum owed balance: sum_t n m_t + sum_i e_i = sum_t sum_i m_i, owners included."""
    method = onebit_adam(2, block=16)
    size, states = 3, [onebit_adam(2, block=16).init(ORDINARY)] * 3
    came, sent = torch.zeros(ORDINARY.numel), torch.zeros(ORDINARY.numel)
    for step in range(12):
        xs, before = draw(size, seed=step), states[0]["momentum"].data
        states = converse(method, xs, states, step=step).states
        if step >= 2:
            came += sum(0.9 * before + 0.1 * x for x in xs)
            sent += size * states[0]["momentum"].data
    residual = torch.zeros(ORDINARY.numel)
    for state in states:
        cut = cut_state(state)
        for param, piece in ORDINARY.pieces(residual):
            piece += cut[param.name].get("inner/residual", torch.zeros(param.numel))
    assert float(residual.norm()) > 1
    torch.testing.assert_close(sent + residual, came, atol=1e-3, rtol=1e-4)


def test_what_never_had_a_gradient_does_not_move() -> None:
    method = onebit_adam(3)
    states = [method.init(NET)] * 3
    for step in range(6):
        xs = draw(3, NET, seed=step)
        for x in xs:
            x[:10] = 0
        round_ = converse(method, xs, states, NET, step)
        states = round_.states
        assert not round_.estimate[:10].any()
        assert float(round_.estimate.abs().max()) < 100


def test_bytes_fall_when_the_variance_freezes() -> None:
    method, states = onebit_adam(2), [onebit_adam(2).init(ORDINARY)] * 4
    for step in range(4):
        round_ = converse(method, draw(4, seed=step), states, step=step)
        states = round_.states
        assert sum(round_.sent_bytes) / 4 == pytest.approx(method.payload_bytes(ORDINARY, 4, step), abs=16)
    assert method.payload_bytes(ORDINARY, 4, 2) < method.payload_bytes(ORDINARY, 4, 1) / 5


def test_the_optimizer_must_be_plain() -> None:
    w = [torch.nn.Parameter(torch.zeros(3))]
    onebit_adam().check(torch.optim.SGD(w, lr=0.1))
    for optimizer in (None, torch.optim.Adam(w), torch.optim.SGD(w, lr=0.1, momentum=0.9)):
        with pytest.raises(DistcompError, match="SGD"):
            onebit_adam().check(optimizer)
        with pytest.raises(DistcompError, match="SGD"):
            ErrorFeedback(onebit_adam()).check(optimizer)
        parse("qsgd").check(optimizer)


def test_what_it_cannot_do_is_refused() -> None:
    for refused in (
        lambda: onebit_adam(0),
        lambda: onebit_adam(betas=(0.9, 1.0)),
        lambda: onebit_adam(eps=0.0),
        lambda: onebit_adam(bits=9),
    ):
        with pytest.raises(DistcompError):
            refused()
    assert isinstance(onebit_adam().inner, ErrorFeedback)
