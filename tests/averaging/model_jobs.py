"""What the ranks do in the tests: small models, real processes, real backward."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.averaging.gossip import DCD
from distcomp.collectives import Group, NeighborExchange
from distcomp.payload import Part, Payload
from distcomp.transports.gloo_p2p import GlooP2P
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.torchdist import TorchDist
from tests.cluster import threads_left


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5)
    )


def batch(rank: int, index: int) -> tuple[Tensor, Tensor]:
    """The same for the same rank and step, whenever it is asked for."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * rank + index))
    return x, x[:, :5].argmax(1)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int, start: int = 0) -> None:
    for index in range(start, start + steps):
        x, y = batch(rank, index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    """All weights and floating-point buffers."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def wrapped(kind: str, seed: int = 0) -> nn.Module:
    model = network(seed)
    return DistributedDataParallel(model, bucket_cap_mb=0.002) if kind == "ddp" else model


def start(
    kind: str, spec: Any, rank: int, **options: Any
) -> tuple[nn.Module, torch.optim.SGD, distcomp.Handle]:
    model = wrapped(kind, seed=0 if kind == "ddp" else rank)
    optimizer = sgd(model)
    return model, optimizer, distcomp.attach(model, optimizer, spec, **options)


@dataclass(frozen=True)
class InPairs(DCD):
    """Gossip in groups of two consecutive ranks."""

    def group(self, rank: int, size: int) -> Group:
        return (rank - rank % 2, rank - rank % 2 + 1)


def mixed_in_groups(rank: int, size: int, carrier: type[GlooP2P | TorchDist]) -> float:
    """What the other one of groups (0, 3) and (1, 2) has sent."""
    world = dist.group.WORLD
    heartbeat = Heartbeat(world.get_group_store(), rank, size, carrier.__name__)
    transport = carrier(world, heartbeat, 30.0)
    payload = Payload.empty((Part("values", torch.float32, 1),))
    payload["values"].fill_(rank)
    other = 3 - rank
    (wire,) = transport.start(
        NeighborExchange(payload, (other,), (min(rank, other), max(rank, other)))
    ).wait()
    transport.close()
    heartbeat.close()
    return float(Payload(wire, payload.parts)["values"])


def trained(rank: int, size: int, kind: str, spec: Any, steps: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The weights before and after the last averaging, and the statistics between."""
    model, optimizer, handle = start(kind, spec, rank)
    train(model, optimizer, rank, steps)
    handle.state_dict()  # makes the last iteration's exchange
    own, stats = flat(model), handle.stats()
    handle.detach()
    return own, flat(model), stats


def counted(rank: int, size: int, spec: Any, steps: int) -> tuple[list[int], int]:
    """The bytes of each step as they are recorded, and all that were sent from the first one on."""
    model, optimizer, handle = start("plain", spec, rank)
    begun, recorded = handle.stats()["payload_bytes"], []
    handle.watch(lambda record: recorded.append(record["payload_bytes"]))
    train(model, optimizer, rank, steps)
    handle.state_dict()  # makes the last iteration's exchange
    sent = handle.stats()["payload_bytes"] - begun  # before the average of models with which it ends
    handle.detach()
    return recorded, sent


def begun(rank: int, size: int, seeds: tuple[int, ...]) -> tuple[int, Tensor]:
    """The bytes that a rank sends when it is attached, and what all then begin with."""
    model = network(seeds[rank])
    handle = distcomp.attach(model, sgd(model), "local_sgd:period=4")
    sent, begins_with = handle.stats()["payload_bytes"], flat(model)
    handle.detach()
    return sent, begins_with


def resumed(rank: int, size: int, kind: str, spec: Any, at: int, steps: int) -> tuple[Tensor, Tensor]:
    """One run through, and one that is saved at step ``at`` and goes on in another model."""
    model, optimizer, handle = start(kind, spec, rank)
    train(model, optimizer, rank, at)
    saved = {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "distcomp": handle.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    reread = torch.load(file, weights_only=True)
    train(model, optimizer, rank, steps - at, start=at)
    handle.state_dict()
    through = flat(model)
    handle.detach()

    other, fresh, handle = start(kind, spec, rank)
    other.load_state_dict(reread["model"])
    fresh.load_state_dict(reread["optimizer"])
    handle.load_state_dict(reread["distcomp"])
    train(other, fresh, rank, steps - at, start=at)
    handle.state_dict()
    again = flat(other)
    handle.detach()
    return through, again


def saved(rank: int, size: int, spec: Any, steps: int) -> tuple[dict[str, Any], Tensor]:
    """A rank's part of a checkpoint, and its weights."""
    model, optimizer, handle = start("plain", spec, rank)
    train(model, optimizer, rank, steps)
    state, own = handle.state_dict(), flat(model)
    handle.detach()
    return state, own


def loaded(
    rank: int, size: int, spec: Any, parts: list[dict[str, Any]], steps: int
) -> tuple[Tensor, Tensor, int]:
    """The weights right after loading all old ranks' parts, and after more steps."""
    model, optimizer, handle = start("plain", spec, rank)
    handle.load_state_dict(parts)
    at_first = flat(model)
    iterations = handle.stats()["iterations"]
    train(model, optimizer, rank, steps, start=50)
    handle.detach()
    return at_first, flat(model), iterations


def skipped_on_one_rank(rank: int, size: int, kind: str, spec: Any) -> tuple[Tensor, int, float]:
    """Rank 1's gradients overflow in one step: its GradScaler skips it, the others do not."""
    model, optimizer, handle = start(kind, spec, rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for index in range(6):
        x, y = batch(rank, index)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (math.inf if (rank, index) == (1, 2) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    iterations = handle.stats()["iterations"]
    handle.detach()
    return flat(model), iterations, scaler.get_scale()


def accumulated(rank: int, size: int, kind: str, spec: Any) -> tuple[Tensor, int]:
    """Each step's batch in two halves, the first in ``no_sync``."""
    model, optimizer, handle = start(kind, spec, rank)
    for index in range(6):
        optimizer.zero_grad()
        halves = [torch.chunk(part, 2) for part in batch(rank, index)]
        for half, (x, y) in enumerate(zip(*halves, strict=True)):
            with handle.no_sync() if half == 0 else torch.enable_grad():
                (nn.functional.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    handle.state_dict()
    own, iterations = flat(model), handle.stats()["iterations"]
    handle.detach()
    return own, iterations


def with_optimizer_state(rank: int, size: int, policy: str) -> list[Tensor | None]:
    """Adam's first moment before and after an exchange, before the next step."""
    model = network(0)
    optimizer = torch.optim.Adam(model.parameters())
    handle = distcomp.attach(model, optimizer, distcomp.local_sgd(period=3, optimizer_state=policy))
    train(model, optimizer, rank, 3)
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    handle.state_dict()
    after = optimizer.state.get(model[0].weight, {}).get("exp_avg", None)
    after = None if after is None else after.clone()
    train(model, optimizer, rank, 1, start=3)
    handle.detach()
    return [before, after]


def with_buffers(rank: int, size: int, spec: Any) -> tuple[Tensor, Tensor]:
    """BatchNorm's running mean after three steps, before and after the exchange."""
    model, optimizer, handle = start("plain", spec, rank)
    train(model, optimizer, rank, 3)
    before = model[1].running_mean.clone()
    handle.state_dict()
    after = model[1].running_mean.clone()
    handle.detach()
    return before, after


def evaluated(rank: int, size: int, spec: Any) -> dict[str, Any]:
    """What the averaged model is, and that training then goes on where it was."""
    model, optimizer, handle = start("plain", spec, rank)
    train(model, optimizer, rank, 4)
    handle.state_dict()
    own = flat(model)
    with handle.averaged_model() as spread:
        mean = flat(model)
    again = flat(model)
    handle.finish()
    finished = flat(model)
    handle.detach()
    return {"own": own, "mean": mean, "again": again, "spread": spread, "finished": finished}


def detached_then_ddp(rank: int, size: int) -> Tensor:
    """Averaging, then plain DDP on the same model."""
    model, optimizer, handle = start("ddp", distcomp.choco(), rank)
    train(model, optimizer, rank, 3)
    handle.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, rank, 3, start=3)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def swapped(rank: int, size: int) -> int:
    """A method for gradients after one for models, and the other way round, on one model."""
    model = wrapped("ddp")
    for spec in ("local_sgd:period=2", "qsgd:bits=8", "dcd"):
        with distcomp.attach(model, sgd(model), spec) as handle:
            train(model, sgd(model), rank, 3)
            assert handle.stats()["iterations"] == 3
    return 0


def diverging(rank: int, size: int, spec: Any) -> str:
    """Rank 1's weights become NaN; what the ranks are told."""
    model, optimizer, handle = start("plain", spec, rank)
    try:
        with handle:
            for index in range(4):
                train(model, optimizer, rank, 1, start=index)
                if (rank, index) == (1, 1):
                    model[0].weight.data.fill_(math.nan)
    except distcomp.DistcompError as error:
        return str(error)
    return "nothing"


def refusals(rank: int, size: int) -> list[str]:
    """The sentences with which attach refuses what it cannot serve."""
    plain, found = network(), []

    def attempt(model: nn.Module, spec: Any, optimizer: Any = None) -> None:
        try:
            distcomp.attach(model, optimizer, spec).detach()
            found.append("accepted")
        except distcomp.DistcompError as error:
            found.append(str(error))

    attempt(plain, "qsgd")
    attempt(DistributedDataParallel(network(), find_unused_parameters=True), "choco")
    attempt(nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)), "choco")
    attempt(plain, distcomp.local_sgd(optimizer_state="reset"))
    attempt(plain, distcomp.dpsgd(topology="one_peer_exponential"))
    attempt(nn.ReLU(), "choco")
    with distcomp.attach(plain, None, "choco"):
        attempt(plain, "choco")
    return found


def called_inside(rank: int, size: int) -> str:
    """The loop calls what the attached model wraps."""
    model = wrapped("ddp")
    optimizer = sgd(model)
    handle = distcomp.attach(model, optimizer, "local_sgd:period=2")
    try:
        train(model.module, optimizer, rank, 2)
    except distcomp.DistcompError as error:
        return str(error)
    finally:
        handle.detach()
    return "nothing"


def compiled(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """The same training with torch.compile around the model and without."""
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = wrap(network())
        optimizer = sgd(model)
        handle = distcomp.attach(model, optimizer, "choco")
        train(model, optimizer, rank, 4)
        handle.state_dict()
        results.append(flat(model))
        handle.detach()
    return results[0], results[1]


def mourning(rank: int, size: int, spec: Any, dies: int, how: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """Rank ``dies`` is killed, or stops for good, in step 3; what becomes of the others."""
    model, optimizer, handle = start("plain", spec, rank, timeout_s=timeout_s)
    found: dict[str, Any] = {"warned": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for index in range(6):
                if (rank, index) == (dies, 3):
                    os.kill(os.getpid(), getattr(signal, how))
                train(model, optimizer, rank, 1, start=index)
            handle.state_dict()
            found["own"] = flat(model)
            with handle.averaged_model() as found["spread"]:
                found["mean"] = flat(model)
            found["lost"] = handle.stats().get("lost")
            handle.detach()
            found["end"] = flat(model)
        except distcomp.DistcompError as error:
            found["error"] = f"{type(error).__name__}: {error}"
    found["warned"] = [str(one.message) for one in caught if "goes on without" in str(one.message)]
    return found


def post_local(rank: int, size: int, kind: str, after: int, period: int, steps: int) -> list[Tensor]:
    """Weights after each step under AdamW: by distcomp, or by PyTorch's hook and averager, whose first
    exchange of models is at its ``warmup_steps`` + 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    inner = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    optimizer: Any = inner
    if kind == "distcomp":
        handle = distcomp.attach(ddp, inner, distcomp.post_local_sgd(period=period, after=after))
    else:
        optimizer = _pytorch_post_local(ddp, inner, after, period)
    seen = []
    for index in range(steps):
        train(ddp, optimizer, rank, 1, start=index)
        if kind == "distcomp":
            handle.state_dict()  # makes the exchange of this step now instead of at the next forward
        seen.append(flat(model).clone())
    if kind == "distcomp":
        handle.detach()
    return seen


def _pytorch_post_local(
    ddp: DistributedDataParallel, inner: torch.optim.Optimizer, after: int, period: int
) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post_local_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    alone, _ = dist.new_subgroups(group_size=1)
    state = post_local_hook.PostLocalSGDState(
        None, alone, start_localSGD_iter=after, post_local_gradient_allreduce=False
    )
    ddp.register_comm_hook(state, post_local_hook.post_localSGD_hook)
    averager = PeriodicModelAverager(period=period, warmup_steps=after + period - 1)
    return PostLocalSGDOptimizer(optim=inner, averager=averager)


def straying(rank: int, size: int, spec: Any, how: str, timeout_s: float) -> dict[str, Any]:
    """Rank 2 is slow, or ends early, while the others train on: what each is told, and where it ends."""
    model, optimizer, handle = start("plain", spec, rank, timeout_s=timeout_s)
    found: dict[str, Any] = {"told": ""}
    store = dist.group.WORLD.get_group_store()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for index in range(6):
                if (rank, index) == (2, 3) and how == "slow":
                    store.wait([f"trained/{other}" for other in (0, 1, 3)])
                if (rank, index) == (2, 3) and how == "ends":
                    break
                train(model, optimizer, rank, 1, start=index)
            if rank != 2:
                handle.state_dict()
                store.set(f"trained/{rank}", "on")
                found["own"] = flat(model)
                with handle.averaged_model():
                    found["mean"] = flat(model)
                store.wait(["told"])
            handle.detach()
        except distcomp.DistcompError as error:
            found["told"] = f"{type(error).__name__}: {error}"
            store.set("told", "yes")
            with contextlib.suppress(distcomp.DistcompError):
                handle.detach()
    found["warned"] = [str(one.message) for one in caught if "goes on without" in str(one.message)]
    found["threads"] = threads_left()
    return found
