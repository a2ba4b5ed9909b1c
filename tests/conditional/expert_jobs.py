"""What the ranks do in the tests: mixtures whose experts are spread over ranks, beside one process."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import calls
from distcomp.conditional import (
    MixtureOfExperts,
    balance_loss,
    expert_optimizer_state,
    keep_experts_local,
    load_expert_optimizer_state,
)
from distcomp.conditional.expert_traffic import balance_call_bytes, count_call_bytes, row_call_bytes

WIDTH, HIDDEN, EXPERTS, TOKENS = 16, 32, 8, 16


def tokens_of(rank: int, step: int = 0, count: int = TOKENS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 * rank + step))


def gate_weights(kind: str) -> Tensor:
    """``mixed``: tokens everywhere; ``lonely``: some experts get none at all; ``one``: all go to two
    experts."""
    weights = torch.randn(WIDTH, EXPERTS, generator=torch.Generator().manual_seed(1))
    if kind == "lonely":
        weights[:, 4:] = 0  # their scores are 0: only tokens whose others are all negative go there
        weights[:, :4] = weights[:, :4].abs()
    if kind == "one":
        weights[:] = 0
        weights[0, 2:4] = torch.tensor([3.0, 2.0])
    return weights


def mixture(kind: str, **options: Any) -> MixtureOfExperts:
    moe = MixtureOfExperts(WIDTH, HIDDEN, EXPERTS, k=2, noisy=False, **options)
    with torch.no_grad():
        moe.gate.clean.copy_(gate_weights(kind))
    return moe


def loss_of(moe: nn.Module, x: Tensor) -> Tensor:
    return (moe(x).sin() * x).sum() / 64  # a power of two: a mean over ranks loses no bit


def alone(size: int, kind: str, capacity: float | None = None) -> dict[str, Any]:
    """One process with all tokens: answers, gradients."""
    moe = mixture(kind, capacity=capacity)
    x = torch.cat([tokens_of(rank) for rank in range(size)]).requires_grad_()
    out = moe(x)
    ((out.sin() * x).sum() / 64 / size + moe.balance_loss).backward()
    experts = {name: getattr(moe, name).grad for name in ("up", "up_bias", "down", "down_bias")}
    return {
        "out": out.detach(),
        "experts": experts,
        "gate": moe.gate.clean.grad,
        "counts": moe.routing.by_expert,
    }


def spread(rank: int, size: int, kind: str, wire: str = "identity") -> dict[str, Any]:
    """The same with experts on all ranks."""
    moe = mixture(kind, parallel=dist.group.WORLD, wire=wire)
    x = tokens_of(rank).requires_grad_()
    out = moe(x)
    ((out.sin() * x).sum() / 64 + moe.balance_loss).backward()
    experts = {name: getattr(moe, name).grad for name in ("up", "up_bias", "down", "down_bias")}
    gate = moe.gate.clean.grad.clone()
    dist.all_reduce(gate)
    calls.disconnect()
    return {
        "out": out.detach(), "experts": experts, "gate": gate / size, "own": list(moe.own),
        "counts": moe.routing.by_expert,
    }  # fmt: skip


def gradients_of_the_balance(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Of the balancing loss alone, as the mean over ranks, and in one process."""
    gradients = []
    for options, x in (
        ({"parallel": dist.group.WORLD}, tokens_of(rank)),
        ({}, torch.cat([tokens_of(other) for other in range(size)])),
    ):
        moe = mixture("mixed", **options)
        moe(x)
        moe.balance_loss.backward()
        gradient = moe.gate.clean.grad
        if options:
            dist.all_reduce(gradient)
            gradient /= size
        gradients.append(gradient)
    calls.disconnect()
    return gradients[0], gradients[1]


def counted(rank: int, size: int, wire: str) -> tuple[int, int]:
    """Bytes of a step, by the ledger and by the formula."""
    moe = mixture("mixed", parallel=dist.group.WORLD, wire=wire)
    x = tokens_of(rank).requires_grad_()
    before = sum(calls.sent_bytes().values())
    loss_of(moe, x).backward()
    sent = sum(calls.sent_bytes().values()) - before
    each = EXPERTS // size
    to = [sum(moe.routing.by_expert[r * each : (r + 1) * each]) for r in range(size)]
    told = torch.tensor(to)
    matrix = [torch.empty_like(told) for _ in range(size)]
    dist.all_gather(matrix, told)
    received = [int(row[rank]) for row in matrix]
    others = [other for other in range(size) if other != rank]
    due = count_call_bytes(each, size)
    for rows in (to, received, to, received):  # out, back, and the gradients of both
        due += row_call_bytes([rows[other] for other in others], WIDTH, wire)
    due += balance_call_bytes(EXPERTS, size)
    calls.disconnect()
    return sent, due


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.moe = mixture("mixed", **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        scores: Tensor = self.head(x + self.moe(x))
        return scores


def labels_of(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def oracle(size: int, steps: int) -> Model:
    """One process, all tokens, the mean loss."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        x = torch.cat([tokens_of(rank, step) for rank in range(size)])
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), labels_of(x)) + balance_loss(model)).backward()
        optimizer.step()
    return model


def composed(rank: int, size: int, wrapper: str, method: str, held: int = 1) -> float:
    """The rest of the model under DDP or FSDP2 by a method; experts on groups of ``size / held``: the
    distance of all weights from one process."""
    groups = [dist.new_group(list(range(at, at + size // held))) for at in range(0, size, size // held)]
    holders = [dist.new_group(list(range(at, size, size // held))) for at in range(size // held)]
    parallel = groups[rank // (size // held)]
    options = {"holders": holders[rank % (size // held)]} if held > 1 else {}
    model: nn.Module = Model(parallel=parallel, balance=dist.group.WORLD, **options)
    local = keep_experts_local(model)
    inner = model
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, ignored_params=local)
    optimizer = torch.optim.SGD(inner.parameters(), 0.1, momentum=0.9)
    with distcomp.attach(model, optimizer, method):
        for step in range(5):
            x = tokens_of(rank, step)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), labels_of(x)) + balance_loss(inner)).backward()
            optimizer.step()
    expected = dict(oracle(size, 5).named_parameters())
    worst = 0.0
    own = inner.moe.own
    for name, parameter in inner.named_parameters():
        mine = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        wanted = expected[name][own.start : own.stop] if parameter in local else expected[name]
        worst = max(worst, (mine - wanted).abs().max().item())
    for group in (None, parallel, options.get("holders")):
        calls.disconnect(group)
    return worst


def without_holders(rank: int, size: int) -> str:
    """Experts on half of the ranks, and nobody told of the others who hold them."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    try:
        mixture("mixed", parallel=groups[rank // 2])
    except distcomp.DistcompError as error:
        return str(error)
    finally:
        calls.disconnect(groups[rank // 2])
    return "nothing"


def train(model: nn.Module, inner: nn.Module, optimizer: Any, rank: int, size: int, steps: range) -> None:
    for step in steps:
        # Four portions of tokens in each step, however many ranks there are.
        x = torch.cat([tokens_of(part, step) for part in range(rank * 4 // size, (rank + 1) * 4 // size)])
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), labels_of(x)) + balance_loss(inner)).backward()
        optimizer.step()


def begin(rank: int, size: int) -> tuple[Any, Any, Any]:
    inner = Model(parallel=dist.group.WORLD)
    keep_experts_local(inner)
    model = DistributedDataParallel(inner)
    return model, inner, torch.optim.SGD(inner.parameters(), 0.1, momentum=0.9)


def saves(rank: int, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Three steps on these ranks: the model's part, the experts' momentum, the rest's momentum by name."""
    model, inner, optimizer = begin(rank, size)
    train(model, inner, optimizer, rank, size, range(3))
    shared = {
        name: optimizer.state[parameter]["momentum_buffer"].clone()
        for name, parameter in inner.named_parameters()
        if name.split(".")[-1] not in ("up", "up_bias", "down", "down_bias")
    }
    state = {name: value.clone() for name, value in inner.state_dict().items()}
    moved = expert_optimizer_state(inner, optimizer)
    calls.disconnect()
    return state, moved, shared


def goes_on(rank: int, size: int, state: Any, moved: Any, shared: Any) -> dict[str, Tensor]:
    """Three steps more, from what another number of ranks saved: this rank's part at the end."""
    model, inner, optimizer = begin(rank, size)
    inner.load_state_dict(dict(state))
    load_expert_optimizer_state(inner, optimizer, moved)
    for name, parameter in inner.named_parameters():
        if name in shared:
            optimizer.state[parameter]["momentum_buffer"] = shared[name].clone()
    train(model, inner, optimizer, rank, size, range(3, 6))
    calls.disconnect()
    return {name: value.clone() for name, value in inner.state_dict().items()}


def killed(rank: int, size: int) -> str:
    """Rank 1 dies after the first step; the words in which another one's next step ends."""
    calls.connect(timeout_s=20)
    moe = mixture("mixed", parallel=dist.group.WORLD)
    loss_of(moe, tokens_of(rank)).backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        loss_of(moe, tokens_of(rank, 1)).backward()
    except distcomp.DistcompError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        calls.disconnect()
    return "nothing"


UNEVEN = (24, 0, 7, 16)
"""Tokens of each rank: many, none, an odd number, as elsewhere."""


def uneven(rank: int, size: int, capacity: float | None) -> dict[str, Any]:
    """Ranks with other numbers of tokens, spread and, of this rank's tokens, in one process."""
    found: dict[str, Any] = {}
    for kind, options in (("spread", {"parallel": dist.group.WORLD}), ("alone", {})):
        moe = mixture("one", capacity=capacity, importance_weight=0.0, load_weight=0.0, **options)
        x = tokens_of(rank, count=UNEVEN[rank]).requires_grad_()
        out = moe(x)
        (out.sin() * x).sum().backward()
        found[kind] = {
            "out": out.detach(), "x": x.grad, "up": moe.up.grad, "dropped": moe.routing.dropped,
            "own": list(moe.own),
        }  # fmt: skip
    calls.disconnect()
    return found
