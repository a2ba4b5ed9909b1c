"""What the ranks do in the tests of conditional layers beside other features."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distcomp
from distcomp import calls
from distcomp.conditional import MixtureOfExperts, UnitDropout, keep_experts_local, stochastic_depth
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
