"""What ranks do to test gathers of weights: what each computed with, beside the weights that are trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distcomp

from .shard_jobs import batch, flat, local, mesh_of, network, sgd, sharded, start, through_torch_save, train


def watch(model: nn.Sequential) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What the Linear layers hold in each forward, and in each backward."""
    forwards: list[dict[str, Tensor]] = []
    backwards: list[dict[str, Tensor]] = []
    for index in (0, 3, 5):

        def copied(part: nn.Module, index: int = index) -> dict[str, Tensor]:
            return {f"{index}.{name}": p.detach().clone() for name, p in part.named_parameters()}

        def before_resharding(part: nn.Module, given: object, output: Tensor, copied: Any = copied) -> None:
            forwards.append(copied(part))

        def after(part: nn.Module, given: object, output: Tensor, copied: Any = copied) -> None:
            output.register_hook(lambda _: backwards.append(copied(part)))

        model[index].register_forward_hook(before_resharding, prepend=True)
        model[index].register_forward_hook(after)
    return forwards, backwards


def merged(recorded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for one in recorded for name, value in one.items()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained."""
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def computed(
    rank: int, size: int, weights: str, steps: int, forwards: int = 1, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """After some steps and ``forwards`` more without a step: the trained weights before and after, what the
    last forward and its backward computed with, and statistics."""
    model = sharded(mesh_of(size)["shard"], **options)
    optimizer = sgd(model)
    with distcomp.attach(model, optimizer, "identity", weights=weights) as handle:
        train(model, optimizer, rank, steps)
        stats = handle.stats()
        x, y = batch(rank, 99)
        for _ in range(forwards - 1):
            model(x)
            model.reshard()  # without a backward the root keeps its weights
        before = whole(model)
        in_forward, in_backward = watch(model)
        nn.functional.cross_entropy(model(x), y).backward()
        return before, whole(model), merged(in_forward), merged(in_backward), stats


def computed_in(rank: int, size: int, weights: str, policy: Any) -> Any:
    """As :func:`computed`, in a policy's types."""
    return computed(rank, size, weights, 2, mp_policy=policy)


def left(rank: int, size: int, weights: str, steps: int) -> tuple[Tensor, Tensor]:
    """Some steps of FSDP by itself, on a model that was never attached and on one that was left."""
    found = []
    for attached in (False, True):
        model = sharded(mesh_of(size)["shard"])
        if attached:
            distcomp.attach(model, None, "qsgd:bits=4", weights=weights).detach()
        train(model, sgd(model), rank, steps)
        found.append(flat(model))
    return found[0], found[1]


def sent(rank: int, size: int, weights: str, steps: int, reshard: bool) -> dict[str, int]:
    """Bytes of the ledger in the steps after the first."""
    model = sharded(mesh_of(size)["shard"], reshard_after_forward=reshard)
    optimizer = sgd(model)
    with distcomp.attach(model, optimizer, "identity", weights=weights) as handle:
        train(model, optimizer, rank, 1)
        first = handle.stats()["payload_by_kind"]
        train(model, optimizer, rank, steps, start=1)
        last = handle.stats()["payload_by_kind"]
        assert handle.stats()["last"]["payload_bytes"] * steps == sum(last.values()) - sum(first.values())
    return {kind: last[kind] - first.get(kind, 0) for kind in last}


def resumed(rank: int, size: int, weights: str) -> bool:
    """Eight steps at once, and as four and four with a checkpoint between."""
    model, optimizer, handle = start(rank, size, "qsgd:bits=1", weights=weights)
    with handle:
        train(model, optimizer, rank, 4)
        parameters = list(model.parameters())
        saved = through_torch_save(
            {
                "weights": [p.detach().to_local().clone() for p in parameters],
                "momentum": [optimizer.state[p]["momentum_buffer"].to_local().clone() for p in parameters],
                "distcomp": handle.state_dict(),
            }
        )
        train(model, optimizer, rank, 4, start=4)
        expected = local(model)
    model, optimizer, handle = start(rank, size, "qsgd:bits=1", seed=9, weights=weights)
    with handle:
        with torch.no_grad():
            for p, value, momentum in zip(
                model.parameters(), saved["weights"], saved["momentum"], strict=True
            ):
                p.to_local().copy_(value)
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                optimizer.state[p]["momentum_buffer"].to_local().copy_(momentum)
        handle.load_state_dict(saved["distcomp"])
        train(model, optimizer, rank, 4, start=4)
        return torch.equal(local(model), expected)


def saved_state(rank: int, size: int, weights: str) -> dict[str, Any]:
    model, optimizer, handle = start(rank, size, "identity", weights=weights)
    with handle:
        train(model, optimizer, rank, 2)
        return through_torch_save(handle.state_dict())


def begun_anew(rank: int, size: int, weights: str, saved: list[dict[str, Any]]) -> tuple[list[str], float]:
    """Another number of ranks: what is said, and the loss of some steps."""
    model, optimizer, handle = start(rank, size, "identity", weights=weights)
    with handle, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        handle.load_state_dict(saved)
        return [str(one.message) for one in said], train(model, optimizer, rank, 3)


def poisoned(rank: int, size: int, weights: str) -> tuple[bool, bool]:
    """A weight of rank 0 becomes infinite: whether all ranks see it, and go on when it is mended."""
    model, optimizer, handle = start(rank, size, "identity", weights=weights)
    with handle:
        train(model, optimizer, rank, 2)
        shard = next(model.parameters()).to_local()
        kept = shard.clone()
        if rank == 0:
            with torch.no_grad():
                shard[0, 0] = float("inf")
        broken = model(batch(rank, 5)[0])
        with torch.no_grad():
            shard.copy_(kept)
        return not bool(broken.isfinite().any()), bool(model(batch(rank, 5)[0]).isfinite().all())


def refusal(rank: int, size: int, kind: str, weights: str) -> str:
    """How an attempt is refused."""
    mesh = mesh_of(size, 2 if kind == "replicas" else 1)
    try:
        if kind == "ddp":
            distcomp.attach(nn.parallel.DistributedDataParallel(network()), None, "identity", weights=weights)
        elif kind == "replicas":
            across = mesh.get_group("replicate")
            distcomp.attach(sharded(mesh["shard"]), None, "identity", weights=weights, replicas=across)
        elif kind == "differs":
            mine = weights if rank == 0 else "bf16"
            distcomp.attach(sharded(mesh["shard"]), None, "identity", weights=mine, timeout_s=20)
        else:
            distcomp.attach(sharded(mesh["shard"]), None, "identity", weights=weights)
    except distcomp.DistcompError as error:
        dist.barrier()
        return str(error)
    return "not refused"
