"""Training on GPUs, for :mod:`benchmarks.gpu`: what every rank does, and what is asked of it.

python -m benchmarks._gpu_training      # a rank, started by benchmarks._gpu_place.on_ranks
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import distcomp
from benchmarks._common import SETTINGS
from benchmarks._places import ROOT

INPUTS, CLASSES, BATCH = 64, 10, 64
BARE = "bare"
"""Neither attached nor compressed: torch's own."""
WARM_STEPS = 3
RATE = 0.2

Settings = dict[str, Any]
Job = Callable[[Settings, torch.device], dict[str, Any]]


# -------------------------------------------------------------------------------------------- what is trained


def network(width: int) -> nn.Sequential:
    """The same weights wherever it is made."""
    torch.manual_seed(0)
    sizes = [INPUTS, width, width, width]
    hidden = [(nn.Linear(one, other), nn.GELU()) for one, other in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for pair in hidden for part in pair), nn.Linear(width, CLASSES))


@functools.cache
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Each rank's one, the same on every device: which of the first ten inputs is the largest? Kept, for the
    copy to a device is waited for."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(BATCH, INPUTS, generator=draw)
    return x.to(device), x[:, :CLASSES].argmax(1).to(device)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def wrapped(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP with several buckets."""
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, bucket_cap_mb=1)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """The loss, on the device: nothing here waits for it."""
    x, y = batch(device)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def arrived_s(device: torch.device) -> float:
    """The time, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def trained(
    model: nn.Module, device: torch.device, method: str, steps: int, **options: Any
) -> dict[str, Any]:
    """A run: its losses, what a step took after the first few, what was sent, and, when the method has been
    detached, the digest of the weights."""
    optimizer = sgd(model)
    handle = None if method == BARE else distcomp.attach(model, optimizer, method, **options)
    losses, begin_s = [], 0.0
    for step in range(steps):
        if step == WARM_STEPS:
            begin_s = arrived_s(device)
        losses.append(step_of(model, optimizer, device))
    step_s = (arrived_s(device) - begin_s) / (steps - WARM_STEPS)
    row: dict[str, Any] = {"losses": torch.stack(losses).tolist(), "step_s": step_s}
    if handle is not None:
        row["payload_bytes"] = handle.stats()["payload_bytes"]
        handle.detach()
    return {**row, "digest": digest_of(model)}


def digest_of(model: nn.Module) -> str:
    """Of the bits of all weights; of a sharded model, of the whole."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        total.update(whole.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- jobs


def ddp(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Each method under DDP."""
    rows: dict[str, Any] = {}
    for method in settings["methods"]:
        model = wrapped(network(settings["width"]).to(device), device)
        rows[method] = trained(model, device, method, settings["steps"])
    return rows


def ddp_until_refused(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Each method under DDP, until one raises: after that, ranks may no longer be together."""
    rows: dict[str, Any] = {}
    for method in settings["methods"]:
        try:
            rows |= ddp({**settings, "methods": [method]}, device)
        except Exception as error:
            rows[method] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:400]}"}
            return rows
    return rows


def fsdp2(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Each method, and what gathers weights, on a sharded model."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rows: dict[str, Any] = {}
    for method, weights in settings["methods"]:
        model = network(settings["width"]).to(device)
        for part in model:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        name = method if weights is None else f"{method}, weights {weights}"
        rows[name] = trained(model, device, method, settings["steps"], weights=weights)
    return rows


def graphs(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Forward and backward as they are, and replayed from a graph; DDP and its exchange outside of it."""
    rows: dict[str, Any] = {}
    for method in settings["methods"]:
        for name in ("eager", "graphed"):
            module: Any = network(settings["width"]).to(device)
            if name == "graphed" and device.type == "cuda":
                example = torch.randn(BATCH, INPUTS, device=device)
                # 11: as PyTorch's notes on CUDA graphs ask for where DDP is wrapped around
                module = torch.cuda.make_graphed_callables(module, (example,), num_warmup_iters=11)
            model = wrapped(module, device)
            rows[f"{method}, {name}"] = trained(model, device, method, settings["steps"])
    return rows


def capture(settings: Settings, device: torch.device) -> dict[str, Any]:
    """A backward in one graph, the exchange within; replayed, against the gradients that it gave before.

    What must look at numbers on the host cannot be captured: then this raises.
    """
    model = wrapped(network(settings["width"]).to(device), device)
    optimizer = sgd(model)
    handle = distcomp.attach(model, optimizer, settings["method"])
    x, y = batch(device)

    def gradients() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(11):
            wanted = gradients()
    arrived_s(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        found = gradients()
    graph.replay()
    arrived_s(device)
    handle.detach()
    return {settings["method"]: {"captured": True, "equal": torch.equal(found, wanted)}}


def streams(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Each method with the device to itself, and beside other work; then what the host waited for."""
    rows: dict[str, Any] = {}
    for method in settings["methods"]:
        for name, load in (("alone", contextlib.nullcontext), ("under load", lambda: beside(device))):
            model: nn.Module = network(settings["width"]).to(device)
            if settings["gradients"][method]:
                model = wrapped(model, device)
            with load() as done:
                row = trained(model, device, method, settings["steps"])
            rows[f"{method}, {name}"] = {**row, **(done or {})}
    return rows


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[dict[str, int]]:
    """Products of matrices all the while, on a stream of their own; how many there were stands in what is
    yielded, afterwards. On a CPU a thread alone makes them."""
    done, over = {"products beside": 0}, threading.Event()
    side = 2048 if device.type == "cuda" else 128

    def work() -> None:
        own = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(own) if own is not None else contextlib.nullcontext():
            matrix = torch.randn(side, side, device=device)
            while not over.is_set():
                for _ in range(8):
                    torch.mm(matrix, matrix)
                done["products beside"] += 8
                if own is not None:
                    own.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READS = "aten::_local_scalar_dense"
"""A number that Python read of a tensor, which on a GPU is waited for."""


def waits(settings: Settings, device: torch.device) -> dict[str, Any]:
    """How often a step makes the host wait for the device, by method; and where in the code, if CUDA says."""
    rows: dict[str, Any] = {}
    for method in settings["methods"]:
        model = wrapped(network(settings["width"]).to(device), device)
        optimizer = sgd(model)
        step = functools.partial(step_of, model, optimizer, device)
        handle = None if method == BARE else distcomp.attach(model, optimizer, method)
        for _ in range(WARM_STEPS):
            step()
        rows[method] = {"a step": counted_waits(step, device), "where": places_of_waits(step, device)}
        if handle is not None:
            handle.detach()
    return rows


def counted_waits(step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """By the profiler, whose own waits lie around the step and count in every method's row alike."""
    on_gpu = device.type == "cuda"
    arrived_s(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        step()
    counts = collections.Counter(event.name for event in seen.events())
    return {name: counts[name] for name in (READS, *(WAITS if on_gpu else ())) if counts[name]}


def places_of_waits(step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """By CUDA's own warnings: the lines of Python that waited."""
    if device.type != "cuda":
        return {}
    arrived_s(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = (one for one in caught if "synchronizing CUDA operation" in str(one.message))
    places = (f"{one.filename.removeprefix(f'{ROOT}/')}:{one.lineno}" for one in told)
    return dict(collections.Counter(places).most_common(8))


JOBS: dict[str, Job] = {
    job.__name__: job for job in (ddp, ddp_until_refused, fsdp2, graphs, capture, streams, waits)
}


def main() -> None:
    settings = json.loads(os.environ[SETTINGS])
    rank = int(os.environ["RANK"])
    device = torch.device(settings["device"])
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group(settings["backend"])
    rows = JOBS[settings["job"]](settings, device)
    Path(settings["answers"], f"answer-{rank}").write_text(json.dumps(rows))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # see benchmarks._common.start


if __name__ == "__main__":
    main()
