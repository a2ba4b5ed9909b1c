"""What the ranks do in the tests of conditional layers beside other features."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import calls
from distcomp.conditional import (
    MixtureOfExperts,
    UnitDropout,
    clip_experts_grad_norm_,
    keep_experts_local,
    stochastic_depth,
)
from distcomp.conditional.experts import TENSORS
from tests.conditional.depth_jobs import Net


def edges(rank: int, size: int) -> dict[str, Any]:
    """All of them in one start of processes, by name; what one raises stands in its place."""
    told: dict[str, Any] = {}
    for job in (rows_of_a_period, copied, layers_with_codistillation, own_experts):
        try:
            told[job.__name__] = job(rank)
        except Exception as error:
            told[job.__name__] = repr(error)
    return told


def rows_of_a_period(rank: int) -> tuple[bool, bool]:
    """Are rows of a step within the period of local SGD trained still; alike after the average?"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    units = UnitDropout(model, "0", blocks=4, rate=0.5, seed=1)
    trained = torch.stack([units.rows.kept(step) for step in range(4)]).any(0)
    with distcomp.attach(model, optimizer, units.active_only("local_sgd:period=4")) as handle:
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * rank + step))
            (model(x) - 1).square().sum().backward()
            optimizer.step()
        handle.state_dict()  # ends the exchange under way
        mine = model[0].weight.detach().clone()
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine)
    moved = (mine != before).any(1)
    return bool((moved == trained).all()), torch.equal(others[0], others[1])


def copied(rank: int) -> tuple[bool, bool]:
    """A copy of an attached model with unit dropout: answers from its own weights, and no others change."""
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    units = UnitDropout(model, "0", blocks=4, rate=0.5, seed=1)
    with distcomp.attach(model, optimizer, units.active_only("local_sgd:period=2")):
        x = torch.randn(3, 4)
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        model.eval(), twin.eval()
        same = torch.equal(model(x), twin(x))
        with torch.no_grad():
            twin[0].weight.zero_(), twin[0].bias.zero_()
        return same, not twin(x).any() and bool(model(x).any())


def layers_with_codistillation(rank: int) -> list[tuple[list[str], list[str]]]:
    """The layers awake in each forward, and those that stepped afterwards."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    depth = stochastic_depth(model, "blocks.*", last=0.3, seed=3)
    seen = []
    with distcomp.attach(model, optimizer, "codistill:period=1", shared=torch.ones(4, 8)):
        for step in range(5):
            before = [block.fc.weight.detach().clone() for block in model.blocks]
            ran: set[str] = set()

            def note(module: nn.Module, *_: Any, number: int, ran: set[str] = ran) -> None:
                if module.training:  # else it is what codistillation tells of the shared examples
                    ran.add(f"blocks.{number}")

            hooks = [
                block.fc.register_forward_hook(partial(note, number=number))
                for number, block in enumerate(model.blocks)
            ]
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * rank + step))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
            for hook in hooks:
                hook.remove()
            loss.backward()
            optimizer.step()
            moved = [
                f"blocks.{number}"
                for number, (block, old) in enumerate(zip(model.blocks, before, strict=True))
                if not torch.equal(block.fc.weight, old)
            ]
            seen.append((sorted(ran), moved))
    depth.remove()
    return seen


def own_experts(rank: int) -> tuple[bool, bool]:
    """In a plain module that is averaged: do experts stay each rank's own, and does the rest agree?"""
    torch.manual_seed(rank)
    moe = MixtureOfExperts(8, 16, 4, noisy=False, parallel=dist.group.WORLD)
    model = nn.Sequential(nn.Linear(8, 8), moe)
    keep_experts_local(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with distcomp.attach(model, optimizer, "local_sgd:period=2") as handle:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 8)).square().mean().backward()
            optimizer.step()
        handle.finish()
        parts = [torch.empty_like(moe.up) for _ in range(2)]
        dist.all_gather(parts, moe.up.detach())
        shared = [torch.empty_like(model[0].weight) for _ in range(2)]
        dist.all_gather(shared, model[0].weight.detach())
    calls.disconnect(dist.group.WORLD)
    return not torch.equal(*parts), torch.equal(*shared)


def clipped(rank: int, size: int) -> tuple[float, float, bool]:
    """The largest distance of clipped gradients from those of one process with all tokens; the norm's from
    that process's; and whether ``clip_grad_norm_`` leaves shared gradients unlike (the control)."""
    x = [torch.randn(8, 8, generator=torch.Generator().manual_seed(number)) for number in range(size)]

    def begun(**options: Any) -> tuple[nn.Sequential, MixtureOfExperts]:
        torch.manual_seed(3)
        first = nn.Linear(8, 8)
        moe = MixtureOfExperts(8, 16, 4, noisy=False, **options)
        with torch.no_grad():
            moe.gate.clean.copy_(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
        return nn.Sequential(first, moe), moe

    whole, all_experts = begun()
    whole(torch.cat(x)).square().mean().backward()
    wanted = nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    model, moe = begun(parallel=dist.group.WORLD)
    keep_experts_local(model)
    model = DistributedDataParallel(model)
    model(x[rank]).square().mean().backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    norm = clip_experts_grad_norm_(model, 0.01, dist.group.WORLD)
    here = slice(moe.own.start, moe.own.stop)
    pairs = [
        (model.module[0].weight.grad, whole[0].weight.grad),
        (moe.gate.clean.grad, all_experts.gate.clean.grad),
    ]
    pairs += [(getattr(moe, name).grad, getattr(all_experts, name).grad[here]) for name in TENSORS]
    far = max(float((one - other).abs().max()) for one, other in pairs)
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    parts = [torch.empty_like(kept[0]) for _ in range(size)]
    dist.all_gather(parts, model.module[0].weight.grad)
    calls.disconnect(dist.group.WORLD)
    return far, abs(float(norm - wanted)), not torch.equal(*parts)


def outermost(rank: int, size: int) -> tuple[bool, bool]:
    """DistributedDataParallel around a mixture itself: are the experts' gradients those of no wrapper, bit
    for bit, and the gate's another, the mean over the ranks?"""
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(rank))
    gradients = []
    for wrapped in (True, False):
        moe = MixtureOfExperts(16, 32, 4, parallel=dist.group.WORLD)
        model: nn.Module = moe
        if wrapped:
            keep_experts_local(moe)
            model = DistributedDataParallel(moe)
            distcomp.attach(model, None, "identity").detach()  # takes it for told
        (model(x).square().mean() + moe.balance_loss).backward()
        gradients.append([getattr(moe, name).grad for name in TENSORS] + [moe.gate.clean.grad])
    calls.disconnect(dist.group.WORLD)
    same = list(map(torch.equal, *gradients))
    return all(same[:-1]), same[-1]


def forgotten(rank: int, size: int, outside: bool) -> str:
    """DistributedDataParallel around experts that nobody told it to leave alone."""
    moe = MixtureOfExperts(8, 16, 4, parallel=dist.group.WORLD)
    model = DistributedDataParallel(moe if outside else nn.Sequential(nn.Linear(8, 8), moe))
    try:
        distcomp.attach(model, None, "identity").detach()
    except distcomp.DistcompError as error:
        return str(error)
    finally:
        calls.disconnect(dist.group.WORLD)
    return "nothing"
