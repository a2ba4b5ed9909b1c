"""What ranks do to test gathers of weights: what each computed with, beside the weights that are trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

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


class Adapted(nn.Module):
    """A frozen matrix beside which two thin ones are trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapted(size: int, **options: Any) -> nn.Sequential:
    """Two adapted layers, the second frozen whole, and a head that is trained: a buffer each."""
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(16, 37), nn.Tanh(), Adapted(37, 16), nn.Tanh(), nn.Linear(16, 5))
    model[2].requires_grad_(False)
    for part in (model[0], model[2], model[4]):
        fully_shard(part, mesh=mesh_of(size)["shard"], **options)
    return fully_shard(model, mesh=mesh_of(size)["shard"], **options)


def adapters(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def frozen_kept(rank: int, size: int, weights: str, policy: Any) -> dict[str, Any]:
    """What the layers compute with, and bytes of weights step by step."""
    model = adapted(size, **({} if policy is None else {"mp_policy": policy}))
    optimizer, seen, sent = adapters(model), [], []
    for part in (model[0], model[2], model[4]):
        part.register_forward_hook(
            lambda part, given, output: seen.append([p.detach().clone() for p in part.parameters()]),
            prepend=True,
        )
    with distcomp.attach(model, optimizer, "identity", weights=weights, seed=3) as handle:
        for step in range(3):
            train(model, optimizer, rank, 1, start=step)
            sent.append(handle.stats()["payload_by_kind"]["weights"])
        kept = handle.stats()["state_bytes"]
        computed_with = seen[-3:]
        if policy is None:  # FSDP itself gives a buffer that was frozen whole no type for its gradients
            model[2].up.weight.requires_grad_(True)
        train(model, optimizer, rank, 1, start=3)
        sent.append(handle.stats()["payload_by_kind"]["weights"])
    train(model, optimizer, rank, 1, start=4)
    exact = [p.detach().full_tensor() for p in model[2].parameters()]
    return {"seen": computed_with, "sent": sent, "kept": kept, "exact": exact, "after": seen[-2]}


def frozen_changed(rank: int, size: int, weights: str) -> str:
    """What is said when frozen weights are overwritten."""
    model = adapted(size)
    optimizer = adapters(model)
    with distcomp.attach(model, optimizer, "identity", weights=weights):
        train(model, optimizer, rank, 2)
        with torch.no_grad():
            model[0].base.weight.to_local().add_(1.0)
        try:
            train(model, optimizer, rank, 1)
        except distcomp.DistcompError as error:
            return str(error)
    return "nothing"


def frozen_resumed(rank: int, size: int, weights: str) -> bool:
    """Four steps at once, and as two and two in another job, which gathers the frozen weights again."""
    model = adapted(size)
    optimizer = adapters(model)
    with distcomp.attach(model, optimizer, "qsgd:bits=1", weights=weights, seed=3) as handle:
        train(model, optimizer, rank, 2)
        saved = through_torch_save(
            {
                "weights": [p.detach().to_local().clone() for p in model.parameters()],
                "of": handle.state_dict(),
            }
        )
        train(model, optimizer, rank, 2, start=2)
    again = adapted(size)
    with torch.no_grad():
        for p, value in zip(again.parameters(), saved["weights"], strict=True):
            p.to_local().copy_(value)
    fresh = adapters(again)
    with distcomp.attach(again, fresh, "qsgd:bits=1", weights=weights, seed=3) as handle:
        handle.load_state_dict(saved["of"])
        train(again, fresh, rank, 2, start=2)
    return torch.equal(local(again), local(model))
