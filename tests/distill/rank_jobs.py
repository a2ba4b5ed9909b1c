"""What ranks do to test distillation under DistributedDataParallel and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import distill
from tests.distill.networks import cnn, mlp, rows

METHOD = "qsgd:bits=4"


def wrapped(student: nn.Module, how: str, size: int) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(student)
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    for part in student:
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(student, mesh=mesh)


def weights(model: nn.Module) -> Tensor:
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().reshape(-1) for p in whole])


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor, range]:
    """Each rank's own examples, every third one again."""
    at = step % 3
    x, y = rows(4, seed=10 * rank + at)
    return x, y, range(1000 * rank + 4 * at, 1000 * rank + 4 * at + 4)


def trained(rank: int, size: int, how: str, directory: str) -> dict[str, Any]:
    """Six steps with a cached noisy teacher; what was sent, saved and optimized."""
    model = wrapped(mlp(8), how, size)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    teacher = distill.CachedTeacher(mlp(64, seed=1), Path(directory))
    teach = distill.Distill(model, teacher, distill.hinton(2, 0.7) + distill.mimic(0.1, noise=0.5), seed=3)
    with distcomp.attach(model, optimizer, METHOD) as handle:
        run(teach, optimizer, rank, range(6))
        students = sum(p.numel() for p in mlp(8).parameters())
        names = {name for part in handle.state_dict().values() for name in part["state"]}
        return {
            "weights": weights(model),
            "sent_bytes": handle.stats()["payload_bytes"] / 6,
            "parameters": students,
            "names": names,
            "model_names": set(model.state_dict()),
            "optimized": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
            "last": teach.last,
            "iterations": teach.iterations,
        }


def averaged(rank: int, size: int) -> dict[str, Any]:
    """Four steps with a teacher, models averaged after every two."""
    model = mlp(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    teach = distill.Distill(model, mlp(64, seed=1), distill.hinton(2, 0.7))
    handle = distcomp.attach(model, optimizer, "local_sgd:period=2")
    run(teach, optimizer, rank, range(4))
    names = {name for part in handle.state_dict().values() for name in part["state"]}
    handle.detach()
    sent_bytes = handle.stats()["payload_bytes"]
    return {"weights": weights(model), "sent_bytes": sent_bytes, "names": names}


def run(teach: distill.Distill, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        x, y, keys = batch_of(rank, step)
        optimizer.zero_grad()
        teach(x, y, keys).backward()
        optimizer.step()


def resumed(rank: int, size: int, how: str, directory: str) -> tuple[Tensor, Tensor]:
    """Weights after six steps in one go, and after three, a checkpoint, and three by new objects."""

    def begin(place: str) -> tuple[Any, ...]:
        model = wrapped(mlp(8), how, size)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        teacher = distill.CachedTeacher(mlp(16, seed=1), Path(directory) / place)
        loss = distill.hinton(2, "0.2 ~> 0.9 @ 5") + distill.mimic(0.1, noise=0.5)
        teach = distill.Distill(model, teacher, loss, seed=3)
        return model, optimizer, teach, distcomp.attach(model, optimizer, METHOD)

    model, optimizer, teach, handle = begin("whole")
    run(teach, optimizer, rank, range(6))
    handle.detach()
    whole = weights(model)

    model, optimizer, teach, handle = begin("parts")
    run(teach, optimizer, rank, range(3))
    saved = model.state_dict(), optimizer.state_dict(), teach.state_dict(), handle.state_dict()
    again, fresh, other, attached = begin("parts")
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    attached.load_state_dict(saved[3])
    run(other, fresh, rank, range(3, 6))
    attached.detach()
    handle.detach()
    return whole, weights(again)


def with_heads(rank: int, size: int, how: str) -> tuple[Tensor, Tensor, dict[str, float], list[str]]:
    """Attention, and a translator that is trained with the student: alike on all ranks, then taken off."""
    student, teacher = cnn(4), cnn(6, seed=1)
    loss = distill.hard_labels() + distill.attention({"1": "1"}, beta=5)
    loss = loss + distill.factor_transfer("2", "2", distill.Paraphraser(6, 2), distill.Translator(4, 2))
    distill.install_heads(student, loss.heads())
    model = wrapped_whole(student, how, size)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    teach = distill.Distill(model, teacher, loss)
    draw = torch.Generator().manual_seed(rank)
    with distcomp.attach(model, optimizer, METHOD):
        for _ in range(4):
            optimizer.zero_grad()
            teach(torch.randn(4, 1, 4, 4, generator=draw), torch.randint(4, (4,), generator=draw)).backward()
            optimizer.step()
    everything = weights(model)
    heads = getattr(student, distill.taps.HEADS)
    translators = weights(heads)
    before = weights(distill.Translator(4, 2))
    assert translators.numel() == before.numel()
    teach.remove()
    return everything, translators, teach.last, sorted(student.state_dict())


def wrapped_whole(student: nn.Module, how: str, size: int) -> nn.Module:
    """FSDP2 around the whole: heads run inside the student's forward, whose weights are there."""
    if how == "ddp":
        return DistributedDataParallel(student)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(student, mesh=init_device_mesh("cpu", (size,)))


def first_stage(rank: int, size: int, how: str) -> tuple[float, int, int, Tensor, int]:
    """FitNets' stage one sends the lower half alone."""
    student, teacher = mlp(8), mlp(16, seed=1)
    x, _ = rows(8)
    loss = distill.fitnet_hint("1", "3", distill.regressor(student, "1", teacher, "3", x))
    thaw = distill.freeze_above(student, "1", x)
    distill.install_heads(student, loss.heads())
    below = sum(p.numel() for p in student.parameters() if p.requires_grad)
    model = wrapped_whole(student, how, size)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    teach = distill.Distill(model, teacher, loss)
    with distcomp.attach(model, optimizer, "identity") as handle:
        for step in range(4):
            optimizer.zero_grad()
            teach(rows(8, seed=10 * rank + step)[0]).backward()
            optimizer.step()
        sent = handle.stats()["payload_bytes"] / 4
    found = weights(model)
    teach.remove()
    thaw()
    return sent, below, teach.iterations, found, sum(p.requires_grad for p in student.parameters())


def dropped(rank: int, size: int, how: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Statistics of an ensemble of branches, and of a branch alone, after two steps of each."""

    def after(model: nn.Module, loss: Any) -> dict[str, Any]:
        wrapping = wrapped_whole(model, how, size)
        optimizer = torch.optim.SGD(wrapping.parameters(), 0.05)
        with distcomp.attach(wrapping, optimizer, "identity") as handle:
            for step in range(2):
                x, y = rows(8, seed=10 * rank + step)
                optimizer.zero_grad()
                loss(wrapping(x), y).backward()
                optimizer.step()
            return handle.stats()

    torch.manual_seed(0)
    one = distill.OnTheFlyEnsemble(nn.Linear(6, 80), nn.Linear(80, 40), 80, 3)
    alone = nn.Sequential(nn.Linear(6, 80), nn.Linear(80, 40))
    return after(one, distill.ensemble_loss), after(alone, nn.functional.cross_entropy)


def late_heads(rank: int, size: int) -> str:
    student = DistributedDataParallel(mlp(8))
    loss = distill.fitnet_hint("1", "3", nn.Linear(8, 16))
    try:
        distill.Distill(student, mlp(16, seed=1), loss)
    except distcomp.DistcompError as error:
        return str(error)
    return "nothing"
