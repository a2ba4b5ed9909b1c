"""What the ranks do in the tests: a small FSDP2 model with odd sizes, on real processes."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import distcomp

LR, MOMENTUM = 0.1, 0.9


def network(seed: int = 0) -> nn.Sequential:
    """No side is a multiple of 2 or 4 but the first: every buffer is padded."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 37), nn.LayerNorm(37), nn.Tanh(), nn.Linear(37, 23), nn.Tanh(), nn.Linear(23, 5)
    )


def batch(rank: int, index: int) -> tuple[Tensor, Tensor]:
    """The same for the same rank and step, whenever it is asked for."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * rank + index))
    return x, x[:, :5].argmax(1)


def mesh_of(size: int, replicas: int = 1) -> Any:
    names = ("replicate", "shard")
    return init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=names)


def sharded(mesh: Any, seed: int = 0, **options: Any) -> nn.Sequential:
    """Every Linear a buffer of its own; the norm is left to the root."""
    model = network(seed)
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def by_columns(mesh: Any) -> nn.Module:
    """A matrix of which each rank holds some columns."""
    model = nn.Sequential(nn.Linear(16, 5, bias=False))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda _: Shard(1))


def tensor_parallel(size: int) -> nn.Module:
    """The first layer is cut by columns among those that FSDP then shards for."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    model = network()
    parallelize_module(model[0], mesh["tp"], ColwiseParallel())
    return fully_shard(model, mesh=mesh["dp"])


def sgd(model: nn.Module, spec: Any = "identity") -> torch.optim.SGD:
    """With momentum, unless the method brings its own and says so."""
    usual = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    try:
        (distcomp.parse(spec) if isinstance(spec, str) else spec).check(usual)
    except distcomp.DistcompError:
        return torch.optim.SGD(model.parameters(), lr=LR)
    return usual


def start(
    rank: int, size: int, spec: str, replicas: int = 1, seed: int = 0, **options: Any
) -> tuple[nn.Module, torch.optim.SGD, distcomp.Handle]:
    mesh = mesh_of(size, replicas)
    # Replicas begin differently: attaching makes them alike.
    first = seed if replicas == 1 else 50 + mesh.get_local_rank("replicate")
    model = sharded(mesh["shard"], first)
    optimizer = sgd(model, spec)
    across = mesh.get_group("replicate") if replicas > 1 else None
    return model, optimizer, distcomp.attach(model, optimizer, spec, replicas=across, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int, start: int = 0) -> float:
    loss = torch.zeros(())
    for index in range(start, start + steps):
        x, y = batch(rank, index)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def flat(model: nn.Module) -> Tensor:
    """All weights, from the shards of this rank's mesh."""
    return torch.cat([p.detach().full_tensor().reshape(-1) for p in model.parameters()])


def local(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().to_local().reshape(-1) for p in model.parameters()])


def everyone(mine: Tensor) -> list[Tensor]:
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found


def through_torch_save(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------ jobs


def stock(rank: int, size: int, steps: int, **options: Any) -> Tensor:
    model = sharded(mesh_of(size)["shard"], **options)
    train(model, sgd(model), rank, steps)
    return flat(model)


def trained(rank: int, size: int, spec: str, steps: int, replicas: int = 1) -> tuple[Tensor, dict[str, Any]]:
    model, optimizer, handle = start(rank, size, spec, replicas)
    with handle:
        train(model, optimizer, rank, steps)
        return flat(model), handle.stats()


def divided(rank: int, size: int, factor: float, steps: int, replicas: int) -> list[Tensor]:
    """With ``set_gradient_divide_factor`` on every module: attached, and after leaving."""
    found = []
    for attached in (True, False):
        model, optimizer, handle = start(rank, size, "identity", replicas)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(factor)
                part.set_force_sum_reduction_for_comms(True)
        if not attached:
            handle.detach()
        train(model, optimizer, rank, steps)
        found.append(flat(model))
        handle.detach()
    return found


def left(rank: int, size: int, steps: int) -> Tensor:
    """Attached, trained, detached, and the rest by FSDP itself; attached again, and left once more."""
    model, optimizer, handle = start(rank, size, "identity")
    with handle:
        train(model, optimizer, rank, steps)
    train(model, optimizer, rank, steps, start=steps)
    with distcomp.attach(model, optimizer, "identity"):
        train(model, optimizer, rank, steps, start=2 * steps)
    return flat(model)


def policy(rank: int, size: int, spec: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With gradients reduced in another type: by FSDP, and by a method."""
    found = []
    for attached in (False, True):
        model = sharded(mesh_of(size)["shard"], mp_policy=MixedPrecisionPolicy(reduce_dtype=dtype))
        optimizer = sgd(model)
        handle = distcomp.attach(model, optimizer, spec) if attached else None
        train(model, optimizer, rank, 3)
        found.append(flat(model))
        if handle:
            handle.detach()
    return found[0], found[1]


def first_half(rank: int, size: int, spec: str, replicas: int = 1) -> dict[str, Any]:
    model, optimizer, handle = start(rank, size, spec, replicas)
    with handle:
        train(model, optimizer, rank, 4)
        halfway = {"weights": local(model), "distcomp": handle.state_dict()}
        halfway["momentum"] = [
            optimizer.state[p]["momentum_buffer"].to_local() for p in model.parameters() if optimizer.state[p]
        ]
        saved = through_torch_save(halfway)
        train(model, optimizer, rank, 4, start=4)
        return {**saved, "whole": local(model)}


def second_half(rank: int, size: int, spec: str, saved: list[dict[str, Any]], replicas: int = 1) -> bool:
    model, optimizer, handle = start(rank, size, spec, replicas, seed=9)
    mine = saved[rank]
    with handle, torch.no_grad():
        parameters = list(model.parameters())
        numels = [p.to_local().numel() for p in parameters]
        for p, piece in zip(parameters, torch.split(mine["weights"], numels), strict=True):
            p.to_local().copy_(piece.view_as(p.to_local()))
        for p, momentum in zip(parameters, mine["momentum"], strict=False):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            optimizer.state[p]["momentum_buffer"].to_local().copy_(momentum)
        handle.load_state_dict(mine["distcomp"])
        with torch.enable_grad():
            train(model, optimizer, rank, 4, start=4)
        assert handle.stats()["iterations"] == 8
        return torch.equal(local(model), mine["whole"])


def poisoned(rank: int, size: int, replicas: int, hurt: int) -> tuple[bool, bool, int]:
    """A NaN in the gradient of rank ``hurt``: state before and after, what the shards of all ranks hold."""
    model, optimizer, handle = start(rank, size, "qsgd:bits=1", replicas)
    with handle:
        train(model, optimizer, rank, 2)
        before = handle.state_dict()[f"rank{rank}"]
        x, y = batch(rank, 77)
        optimizer.zero_grad()
        last: list[Tensor] = []

        def again(part: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
            last.append(nn.functional.linear(given[0].detach(), part.weight, part.bias)[:, 4].sum())

        hook = model[5].register_forward_hook(again, prepend=True)  # before FSDP takes the weights away
        loss = nn.functional.cross_entropy(model(x), y)
        hook.remove()
        if rank == hurt:  # the last row of the last layer: in one shard's piece alone
            loss = loss + last[0] * float("nan")
        loss.backward()
        seen = not all(p.grad.to_local().isfinite().all() for p in model.parameters())
        after = handle.state_dict()[f"rank{rank}"]
        same = all(
            torch.equal(value, after["state"][name][leaf])
            for name, leaves in before["state"].items()
            for leaf, value in leaves.items()
        )
        return same, seen, after["iterations"]


def accumulated(rank: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Two backwards to a step, by FSDP and by ``identity``."""
    found = []
    count = 0
    for attached in (False, True):
        model = sharded(mesh_of(size)["shard"])
        optimizer = sgd(model)
        handle = distcomp.attach(model, optimizer, "identity") if attached else None
        for index in range(3):
            optimizer.zero_grad()
            x, y = batch(rank, 10 * index)
            if handle:
                with handle.no_sync():
                    nn.functional.cross_entropy(model(x), y).backward()
            else:
                model.set_requires_gradient_sync(False)
                nn.functional.cross_entropy(model(x), y).backward()
                model.set_requires_gradient_sync(True)
            x, y = batch(rank, 10 * index + 1)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(flat(model))
        if handle:
            count = handle.stats()["iterations"]
            handle.detach()
    return found[0], found[1], count


def scaled(rank: int, size: int) -> list[Tensor]:
    """With a GradScaler whose scale changes, and with none: 1 bit, for its residuals are what matters."""
    found = []
    for scaling in (False, True):
        model = sharded(mesh_of(size)["shard"])
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, enabled=scaling)
        with distcomp.attach(model, optimizer, "qsgd:bits=1", scaler=scaler if scaling else None):
            for index in range(6):
                x, y = batch(rank, index)
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
        found.append(flat(model))
    return found


def sentence(rank: int, size: int, kind: str, spec: str = "identity") -> str:
    """How an attempt is refused."""
    mesh = mesh_of(size, 2 if kind == "hybrid" else 1)
    try:
        if kind == "hybrid":
            distcomp.attach(sharded(mesh), None, spec)
        elif kind == "replicas without shards":
            distcomp.attach(network(), None, spec, replicas=mesh.get_group("shard"))
        elif kind == "tensor parallel":
            distcomp.attach(tensor_parallel(size), None, spec)
        elif kind == "columns":
            distcomp.attach(by_columns(mesh["shard"]), None, spec)
        elif kind == "replicated":
            distcomp.attach(replicate(network(), mesh=mesh["shard"]), None, spec)
        else:
            model = sharded(mesh["shard"])
            distcomp.attach(model, None, spec)
            _misuse(kind, model, rank)
    except distcomp.DistcompError as error:
        dist.barrier()
        return str(error)
    return "not refused"


def _misuse(kind: str, model: nn.Module, rank: int) -> None:
    x, y = batch(rank, 0)
    if kind == "unused":
        nn.functional.cross_entropy(model(x), y).backward()
        model[3].bias.requires_grad_(False)
        nn.functional.cross_entropy(model(x), y).backward()


def loaded(rank: int, size: int, saved: list[dict[str, Any]]) -> str:
    _, _, handle = start(rank, size, "qsgd:bits=1")
    with handle:
        try:
            handle.load_state_dict([one["distcomp"] for one in saved])
        except distcomp.DistcompError as error:
            return str(error)
    return "not refused"
