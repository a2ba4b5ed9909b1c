"""What the ranks do in the tests: residual blocks that are dropped, under DDP, FSDP2 and averaging."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.conditional import sample_layers, stochastic_depth

WIDTH, BLOCKS = 16, 4


class Block(nn.Module):
    """``x + relu(W x + b)``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(x))


class Net(nn.Module):
    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1000 * rank + step))
    return x, x[:, :4].argmax(1)


def step_on(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    optimizer.zero_grad()
    x, y = batch(rank, step)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def alike(model: nn.Module) -> bool:
    mine = weights(model)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, each) for each in everyone)


def by_hand(rank: int, size: int, steps: int, choice: Any) -> Tensor:
    """The oracle: every rank's gradients computed here, blocks left out by hand, SGD with momentum and decay
    that skips what has no gradient."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        awake = choice.awake(step)
        optimizer.zero_grad()
        for other in range(size):
            x, y = batch(other, step)
            x = net.stem(x)
            for number, block in enumerate(net.blocks):
                if f"blocks.{number}" in awake:
                    x = x + torch.relu(block.fc(x))
            (nn.functional.cross_entropy(net.head(x), y) / size).backward()
        optimizer.step()
    return weights(net)


def under_ddp(rank: int, size: int, steps: int, bucket_mb: float) -> tuple[float, bool, list[int], list[int]]:
    """Distance from the oracle; replicas alike; bytes of each step; parameters awake in each step."""
    model = DistributedDataParallel(Net(), bucket_cap_mb=bucket_mb)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    depth = stochastic_depth(model, "blocks.*", last=0.3, seed=5)
    handle = distcomp.attach(model, optimizer, depth.active_only("identity"))
    sent, awake = [], []
    with handle:
        for step in range(steps):
            step_on(model, optimizer, rank, step)
            sent.append(handle.stats()["last"]["payload_bytes"])
            awake.append(len(depth.awake()))
    expected = by_hand(rank, size, steps, depth.choice)
    distance = (weights(model) - expected).abs().max().item()
    return distance, alike(model), sent, awake


def plain_ddp(rank: int, size: int) -> tuple[bool, bool]:
    """Dropped under PyTorch's own reduction, without find_unused_parameters."""
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    depth = stochastic_depth(model, "blocks.*", last=0.3, seed=5)
    for step in range(12):
        step_on(model, optimizer, rank, step)
    expected = by_hand(rank, size, 12, depth.choice)
    return torch.allclose(weights(model), expected, atol=1e-5), alike(model)


def many_steps(rank: int, size: int, steps: int) -> bool:
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    depth = stochastic_depth(model, "blocks.*", seed=1)
    with distcomp.attach(model, optimizer, depth.active_only("qsgd:bits=1")):
        for step in range(steps):
            step_on(model, optimizer, rank, step)
    return alike(model)


def resumed(rank: int, size: int) -> bool:
    """Stop after 7 of 15 iterations: is the end bit-equal to that of a run that did not stop?"""

    def begin() -> tuple[Any, Any, Any, Any]:
        model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        depth = stochastic_depth(model, "blocks.*", last=0.3, seed=3)
        return model, optimizer, depth, distcomp.attach(model, optimizer, depth.active_only("qsgd:bits=2"))

    model, optimizer, depth, handle = begin()
    for step in range(15):
        if step == 7:
            saved = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), depth.state_dict(), handle.state_dict())
            )
        step_on(model, optimizer, rank, step)
    handle.detach()
    again, optimizer, depth, handle = begin()
    for part, state in zip((again, optimizer, depth, handle), saved, strict=True):
        part.load_state_dict(state)
    for step in range(7, 15):
        step_on(again, optimizer, rank, step)
    handle.detach()
    return torch.equal(weights(model), weights(again))


def accumulated(rank: int, size: int) -> tuple[int, float]:
    """Micro-steps under no_sync() have the coins of their iteration: iterations, and the distance from one
    step on both batches at once."""
    ends = []
    for micro_steps in (1, 2):
        model = DistributedDataParallel(Net())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        depth = stochastic_depth(model, "blocks.*", last=0.3, seed=2)
        with distcomp.attach(model, optimizer, depth.active_only("identity")) as handle:
            for step in range(6):
                optimizer.zero_grad()
                x, y = batch(rank, step)
                for micro, (part, labels) in enumerate(
                    zip(x.chunk(micro_steps), y.chunk(micro_steps), strict=True)
                ):
                    if micro + 1 < micro_steps:
                        with handle.no_sync():
                            (nn.functional.cross_entropy(model(part), labels) / micro_steps).backward()
                    else:
                        (nn.functional.cross_entropy(model(part), labels) / micro_steps).backward()
                optimizer.step()
        ends.append((depth.state_dict()["step"], weights(model)))
    assert ends[0][0] == ends[1][0]
    return ends[1][0], (ends[0][1] - ends[1][1]).abs().max().item()


def strayed(rank: int, size: int, how: str) -> str:
    """The words in which training ends on this rank."""
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compare = dist.group.WORLD if how == "compare" else None
    coins = "private" if how in ("private", "compare") else "shared"
    depth = stochastic_depth(model, "blocks.*", last=0.3, coins=coins, compare=compare)
    handle = None
    try:
        handle = distcomp.attach(
            model, optimizer, "identity" if how == "compare" else depth.active_only("identity")
        )
        if how == "resume" and rank == 1:
            depth.load_state_dict({**depth.state_dict(), "step": 40})
        for step in range(12):
            step_on(model, optimizer, rank, step)
    except distcomp.DistcompError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if handle is not None:
            handle.detach()
        distcomp.calls.disconnect()
    return "nothing"


def private(rank: int, size: int) -> tuple[list[int], bool]:
    """The control: coins of each rank's own, everything is sent. Bytes of the steps; replicas alike."""
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    stochastic_depth(model, "blocks.*", last=0.3, coins="private")
    sent = []
    with distcomp.attach(model, optimizer, "identity") as handle:
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(rank, step)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            sent.append(handle.stats()["last"]["payload_bytes"])
    return sent, alike(model)


def averaged(rank: int, size: int) -> tuple[list[int], list[int], bool]:
    """Local SGD, every 2 iterations: bytes of the exchanges; blocks awake in the two iterations before
    each; alike at the end."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    depth = stochastic_depth(model, "blocks.*", last=0.0, seed=4)
    method = depth.active_only("local_sgd:period=2")
    sent, awake = [], []
    with distcomp.attach(model, optimizer, method) as handle:
        before = handle.stats()["payload_bytes"]
        for step in range(9):
            step_on(model, optimizer, rank, step)
            after = handle.stats()["payload_bytes"]
            if after > before:
                last = depth.choice.awake(step - 1) | depth.choice.awake(step - 2)
                sent.append(after - before)
                awake.append(len(last))
            before = after
        handle.finish()
        return sent, awake, alike(model)


def under_fsdp(rank: int, size: int, last: float) -> tuple[float, int, int]:
    """Distance from the oracle; bytes by gradients of all steps; layers that were run."""
    from torch.distributed.fsdp import fully_shard

    model = Net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    depth = stochastic_depth(model, "blocks.*", last=last, seed=5, compare=dist.group.WORLD)
    sent = 0
    with distcomp.attach(model, optimizer, "identity", weights="identity") as handle:
        for step in range(10):
            step_on(model, optimizer, rank, step)
            sent += handle.stats()["last"]["payload_bytes"]
    whole = torch.cat([parameter.full_tensor().detach().reshape(-1) for parameter in model.parameters()])
    distcomp.calls.disconnect()
    return (whole - by_hand(rank, size, 10, depth.choice)).abs().max().item(), sent, depth.run_layers


def sampled(rank: int, size: int) -> tuple[bool, bool, list[int]]:
    """Layers drawn two at a time: do the others keep their weights, and the drawn ones move? Bytes."""
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    layers = sample_layers(model, "blocks.*", k=2, period=3, seed=1)
    kept, moved, sent = True, True, []
    with distcomp.attach(model, optimizer, layers.active_only("identity")) as handle:
        for step in range(9):
            before = {name: weights(model.module.get_submodule(name)) for name in layers.choice.layers}
            step_on(model, optimizer, rank, step)
            for name, old in before.items():
                same = torch.equal(old, weights(model.module.get_submodule(name)))
                if name in layers.choice.awake(step):
                    moved &= not same
                else:
                    kept &= same
            sent.append(handle.stats()["last"]["payload_bytes"])
    return kept and alike(model), moved, sent
