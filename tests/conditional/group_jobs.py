"""What the ranks do in the tests: a cut network whose groups are spread over ranks, beside one process."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import calls, structured
from distcomp.conditional import clip_experts_grad_norm_, merge_groups, spread_groups
from distcomp.structured import BlockDiagonal

GROUPS, CLASSES, BATCH, STEPS = 4, 10, 12, 5
GROUP_OF = {
    "inputs": torch.arange(8) % GROUPS,
    "channels": torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]),
    "hidden": torch.arange(18) % GROUPS,
    "classes": torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1, 0]),  # 4, 3, 2 and 1 of them
}
CUT = {
    "2": (GROUP_OF["inputs"], GROUP_OF["channels"]),
    "5": (GROUP_OF["channels"].repeat_interleave(4), GROUP_OF["hidden"]),
    "7": (GROUP_OF["hidden"], GROUP_OF["classes"]),
}


def network(bias: bool = True) -> nn.Sequential:
    """A shared convolution and norm; a convolution and two dense layers that are cut."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 4, 18, bias=bias), nn.Tanh(), nn.Linear(18, CLASSES),
    )  # fmt: skip
    for layer, (inputs, outputs) in CUT.items():
        structured.install_structures(
            net, layer, lambda _, w, i=inputs, o=outputs: BlockDiagonal(o, i, GROUPS)
        )
    return net


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(BATCH, 2, 6, 6, generator=draw), torch.randint(CLASSES, (BATCH,), generator=draw)


def trained(model: nn.Module, optimizer: Any, steps: range, clip: bool = False) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        if clip and dist.is_initialized() and dist.get_world_size() > 1:
            clip_experts_grad_norm_(model, 0.5)
        elif clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def spread_over(rank: int, size: int, method: str, clip: bool = False, bias: bool = True) -> dict[str, Any]:
    net = network(bias)
    spread = spread_groups(net)
    model = DistributedDataParallel(net)
    optimizer = optimizer_of(net)
    handle = distcomp.attach(model, optimizer, method)
    losses = trained(model, optimizer, range(STEPS), clip)
    found = {
        "losses": losses,
        "state": state_of(net),
        "sent_bytes": handle.stats()["last"]["payload_bytes"],
        "own": list(spread.own),
        "held": sum(parameter.numel() for parameter in spread.local),
        "called_bytes": dict(calls.sent_bytes()),
        "scores": net.eval()(batch(99)[0]).detach(),
    }
    handle.detach()
    calls.disconnect()
    return found


def alone(clip: bool = False, bias: bool = True) -> tuple[list[float], dict[str, Tensor], Tensor]:
    net = network(bias)
    losses = trained(net, optimizer_of(net), range(STEPS), clip)
    return losses, state_of(net), net.eval()(batch(99)[0]).detach()


def merged_into_one_process(states: list[dict[str, Tensor]], bias: bool = True) -> nn.Module:
    net = network(bias)
    for part in net.parameters():
        nn.init.zeros_(part)
    net.load_state_dict(merge_groups(states))
    return net


def resumed(rank: int, size: int, method: str, stop: int) -> dict[str, Tensor]:
    """The state after STEPS steps; with ``stop``, through this rank's checkpoint in between."""
    net, start = network(), 0
    spread_groups(net)
    model, optimizer = DistributedDataParallel(net), optimizer_of(net)
    handle = distcomp.attach(model, optimizer, method)
    if stop:
        trained(model, optimizer, range(stop))
        saved = state_of(net), optimizer.state_dict(), handle.state_dict()
        handle.detach()
        net, start = network(), stop
        spread_groups(net)
        net.load_state_dict(saved[0])
        model, optimizer = DistributedDataParallel(net), optimizer_of(net)
        optimizer.load_state_dict(saved[1])
        handle = distcomp.attach(model, optimizer, method)
        handle.load_state_dict(saved[2])
    trained(model, optimizer, range(start, STEPS))
    handle.detach()
    calls.disconnect()
    return state_of(net)


def from_whole(rank: int, size: int, whole: dict[str, Tensor]) -> Tensor:
    """Scores of parts that took theirs of the cut model's state."""
    net = network()
    spread_groups(net)
    net.load_state_dict(whole)
    scores = net.eval()(batch(99)[0]).detach()
    calls.disconnect()
    return scores


def words_of(call: Any) -> str:
    try:
        call()
    except distcomp.DistcompError as error:
        return str(error)
    return "nothing"


def other_batches(rank: int, size: int) -> str:
    net = network()
    spread_groups(net)
    words = words_of(lambda: net(batch(0, rank)[0]))
    calls.disconnect()
    return words


def refusals(rank: int, size: int) -> dict[str, str]:
    normed = network()
    normed.insert(6, nn.BatchNorm1d(18))
    dense = network()
    dense.insert(6, nn.Linear(18, 18))
    thirds = torch.arange(6) % 3
    cuts = structured.install_structures(
        nn.Sequential(nn.Linear(6, 6)), "0", lambda _, w: BlockDiagonal(thirds, thirds, 3)
    )
    twice = network()
    spread_groups(twice)
    lacking = network().state_dict()
    del lacking[f"2.parametrizations.weight.original{2 * rank}"]
    refused = {
        "uncut": words_of(lambda: spread_groups(nn.Sequential(nn.Linear(6, 6)))),
        "three groups": words_of(lambda: spread_groups(cuts)),
        "norm between": words_of(lambda: spread_groups(normed)),
        "dense between": words_of(lambda: spread_groups(dense)),
        "wrapped": words_of(lambda: spread_groups(DistributedDataParallel(network()))),
        "twice": words_of(lambda: spread_groups(twice)),
        "lacking": words_of(lambda: twice.load_state_dict(lacking)),
    }
    calls.disconnect()
    return refused


def killed(rank: int, size: int) -> str:
    """Rank 1 dies after the first step; the words in which another one's next forward ends."""
    calls.connect(timeout_s=20)
    net = network()
    spread_groups(net)
    net(batch(0)[0]).sum().backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return words_of(lambda: net(batch(1)[0]))
