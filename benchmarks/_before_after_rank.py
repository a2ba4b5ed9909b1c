"""One rank of before_after.py, started by path: it imports the distcomp that PYTHONPATH names and nothing of
this package, for an older checkout has none."""

# No "from __future__ import annotations" here: DDP compares a hook's annotations with the types themselves.

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp

LAYERS, SIDE = 4, 1024
MEAN_IN_4_BITS = "qsgd:bits=4, its mean in 4 bits"


def asked_for(method: str) -> str:
    """What is attached: an older distcomp rounds the mean to the bits of what is sent, today's to more of
    them unless it is told to."""
    if method != MEAN_IN_4_BITS:
        return method
    older = importlib.util.find_spec("distcomp.methods.from_compressor") is None
    return "qsgd:bits=4" if older else "qsgd:bits=4,pattern=reduce_scatter"


def model() -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS))))


def step_s(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    dist.barrier()
    began_s = time.perf_counter()
    optimizer.zero_grad()
    ddp(x).square().mean().backward()
    optimizer.step()
    dist.barrier()
    return time.perf_counter() - began_s


def exchanges(method: str, steps: int) -> dict[str, Any]:
    """What each exchange took, by the slowest rank, and what it sent; the first is a warm-up."""
    ddp = model()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    mine, sent_bytes = [], 0
    with distcomp.attach(ddp, optimizer, asked_for(method)) as handle:
        for step in range(steps + 1):
            step_s(ddp, optimizer, torch.randn(1, SIDE))
            if step:
                last = handle.stats()["last"]
                mine.append(last["exchange_s"])
                sent_bytes = last["payload_bytes"]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    seconds = [max(times) for times in zip(*everyone, strict=True)]
    return {"seconds": seconds, "payload_bytes": sent_bytes}


def cores(method: str, steps: int) -> dict[str, Any]:
    """Seconds of a core that a rank spends in an exchange, with all its threads: a step with the method, less
    a step of the same model whose buckets are filled and sent nowhere, in turns. Of each pair the mean over
    ranks; the first three are warm-ups."""
    silent, attached = model(), model()
    silent.register_comm_hook(None, sent_nowhere)
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=1e-3) for ddp in (silent, attached)]
    x, mine = torch.randn(1, SIDE), []
    with distcomp.attach(attached, optimizers[1], asked_for(method)) as handle:
        for _ in range(steps + 3):
            alone_s = core_s(silent, optimizers[0], x)
            mine.append(core_s(attached, optimizers[1], x) - alone_s)
        sent_bytes = handle.stats()["last"]["payload_bytes"]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine[3:])
    seconds = [sum(times) / len(times) for times in zip(*everyone, strict=True)]
    return {"seconds": seconds, "payload_bytes": sent_bytes}


def sent_nowhere(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def core_s(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    began_s = time.process_time()
    step_s(ddp, optimizer, x)
    return time.process_time() - began_s


def overheads(method: str, steps: int) -> dict[str, Any]:
    """A step with the method over a bare step, pair by pair; the first three are warm-ups."""
    bare, attached = model(), model()
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=1e-3) for ddp in (bare, attached)]
    x = torch.randn(512, SIDE)
    with distcomp.attach(attached, optimizers[1], method):
        times = [
            (step_s(bare, optimizers[0], x), step_s(attached, optimizers[1], x)) for _ in range(steps + 3)
        ]
    return {"seconds": [with_method / alone for alone, with_method in times[3:]]}


def main() -> None:
    settings = json.loads(os.environ["DISTCOMP_BENCHMARK"])
    if not Path(distcomp.__file__).is_relative_to(settings["source"]):
        raise SystemExit(f"{distcomp.__file__} is not in {settings['source']}; check PYTHONPATH")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measure = {"exchange": exchanges, "core": cores, "overhead": overheads}[settings["what"]]
    measured = measure(settings["method"], settings["steps"])
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # Gloo's thread may free a tensor while the interpreter goes, which aborts it


if __name__ == "__main__":
    main()
