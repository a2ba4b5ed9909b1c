"""What ranks do: ``mpirun -n N python -m tests.transports.mpi.jobs BACKEND JOB...`` prints JSON lines."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distcomp
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.mpi.transport import MPITransport
from tests.attaching.ddp import jobs as ddp
from tests.calls import test_calls, test_messages
from tests.collectives import script
from tests.lockstep import together

HALVES = (torch.float16, torch.bfloat16)
REAL = (torch.float32, torch.float64, *HALVES)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def data(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, exact in every type: their sums have one value in any order."""
    return torch.randint(0, 5, (numel,), generator=torch.Generator().manual_seed(rank)).to(dtype)


def collectives(rank: int, size: int) -> dict[str, bool]:
    """Each collective of torch.distributed over MPI, against the same in plain torch."""
    right: dict[str, bool] = {}

    def check(name: str, got: Tensor, wanted: Tensor) -> None:
        right[name] = torch.equal(got, wanted) and right.get(name, True)

    for dtype in (*REAL, *WHOLE):
        for numel in (0, 1, 5000):
            everyone = torch.stack([data(one, numel, dtype) for one in range(size)])
            x = data(rank, numel, dtype)
            dist.all_reduce(x)
            check(f"sum {dtype}", x, everyone.sum(0).to(dtype))
            for op, wanted in ((dist.ReduceOp.MAX, everyone.amax(0)), (dist.ReduceOp.MIN, everyone.amin(0))):
                x = data(rank, numel, dtype)
                dist.all_reduce(x, op)
                check(f"{op} {dtype}", x, wanted)
            x = data(rank, numel, dtype)
            dist.broadcast(x, size - 1)
            check("broadcast", x, everyone[-1])
            pieces = [torch.empty(numel, dtype=dtype) for _ in range(size)]
            dist.all_gather(pieces, data(rank, numel, dtype))
            check("all_gather", torch.stack(pieces), everyone)
    check("mean", averaged(rank), torch.full((3,), (size - 1) / 2))
    for name, (got, wanted) in shuffles(rank, size).items():
        check(name, got, wanted)
    return right


def averaged(rank: int) -> Tensor:
    x = torch.full((3,), float(rank))
    dist.all_reduce(x, dist.ReduceOp.AVG)
    return x


def shuffles(rank: int, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What moves pieces about: (what came, what should)."""
    everyone = torch.arange(float(size * size * 3)).view(size, size, 3)
    mine = everyone[rank]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    out = torch.empty(size, 3)
    dist.all_to_all_single(out, mine)
    found["all_to_all_single"] = out, everyone[:, rank]
    sizes = [one + 1 for one in range(size)]
    x = torch.arange(float(sum(sizes))) + 100 * rank
    out = torch.empty((rank + 1) * size)
    dist.all_to_all_single(out, x, [rank + 1] * size, sizes)
    start = sum(sizes[:rank])
    wanted = torch.cat([torch.arange(float(start), start + rank + 1.0) + 100 * one for one in range(size)])
    found["uneven all_to_all_single"] = out, wanted
    pieces = [torch.empty(3) for _ in range(size)]
    dist.all_to_all(pieces, list(mine))
    found["all_to_all"] = torch.stack(pieces), everyone[:, rank]
    out = torch.empty(size * size, 3)
    dist.all_gather_into_tensor(out, mine)
    found["all_gather_into_tensor"] = out.view(size, size, 3), everyone
    out = torch.empty(3)
    dist.reduce_scatter_tensor(out, mine.reshape(-1).clone())
    found["reduce_scatter_tensor"] = out, everyone[:, rank].sum(0)
    out = torch.empty(3)
    dist.reduce_scatter(out, list(mine))
    found["reduce_scatter"] = out, everyone[:, rank].sum(0)
    x = mine.clone()
    dist.reduce(x, 0)
    found["reduce"] = (x, everyone.sum(0)) if rank == 0 else (mine, mine)
    pieces = [torch.empty(size, 3) for _ in range(size)] if rank == 0 else []
    dist.gather(mine.clone(), pieces or None, 0)
    found["gather"] = (torch.stack(pieces), everyone) if rank == 0 else (mine, mine)
    out = torch.empty(size, 3)
    dist.scatter(out, list(everyone) if rank == 0 else None, 0)
    found["scatter"] = out, mine
    strided = torch.full((3, 2), float(rank)).t()
    dist.broadcast(strided, size - 1)
    found["a tensor that is not contiguous"] = strided, torch.full((2, 3), size - 1.0)
    out = torch.empty(70_000)
    works = [
        dist.irecv(out, (rank - 1) % size),
        dist.isend(torch.full((70_000,), float(rank)), (rank + 1) % size),
    ]
    for work in works:
        work.wait()
    found["isend and irecv"] = out, torch.full((70_000,), float((rank - 1) % size))
    halves = dist.new_group([0, size - 1])
    if rank in (0, size - 1):
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=halves)
        found["a group of two"] = x, torch.tensor([size - 1.0])
    dist.barrier()
    return found


def training(rank: int, size: int, spec: str) -> dict[str, Any]:
    """DDP over this backend; the weights are summed up to the last bit."""
    model = ddp.wrap(ddp.network(width=160))
    optimizer = ddp.sgd(model) if spec in ("plain", "choco") else ddp.sgd(model, spec)
    handle = distcomp.attach(model, optimizer, spec) if spec != "plain" else None
    losses = ddp.train(model, optimizer, rank, 4)
    answer = {
        "losses": losses,
        "weights": ddp.flat(model).double().sum().item(),
        "alike": ddp.replicas_equal(model),
        "sent_bytes": handle.stats()["payload_bytes"] if handle is not None else 0,
    }
    if handle is not None:
        handle.detach()
    return answer


def struck(rank: int, size: int) -> str:
    """Rank 1 stops for good in the middle of training; the others say whom they miss."""
    model = ddp.wrap(ddp.network())
    optimizer = ddp.sgd(model)
    distcomp.attach(model, optimizer, "qsgd:bits=4", timeout_s=6)
    ddp.train(model, optimizer, rank, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        ddp.train(model, optimizer, rank, 2)
    except (RuntimeError, distcomp.DistcompError) as error:
        return str(error)
    return "not noticed"


def requests(rank: int, size: int) -> dict[str, bool]:
    """The script of tests/collectives over MPI, and its bytes as in lock-step."""
    comm = dist.group.WORLD.comm  # type: ignore[union-attr]
    heartbeat = Heartbeat(dist.group.WORLD.get_group_store(), rank, size, "requests")
    right, sent, finite = script.over(MPITransport(comm.Dup(), heartbeat, 60.0), script.script)
    heartbeat.close()
    lockstep = together(script.script, [torch.ones(4)] * size)
    bytes_alike = sent == dict(lockstep.ledgers[rank].sent_bytes)
    return {**right, "finite": finite, "bytes as in lock-step": bytes_alike}


def calls_of_groups(rank: int, size: int) -> dict[str, Any]:
    """tests/calls, in groups of the first one, two, three ... ranks: of each task what went wrong."""
    found: dict[str, Any] = {}
    for count in range(1, size + 1):
        group = dist.new_group(list(range(count)))
        if rank >= count:
            continue
        tasks: dict[str, Callable[[], object]] = {
            "exact": lambda n=count, g=group: test_calls.exact(rank, n, g)
        }
        for codec in test_calls.CODECS:
            tasks[codec] = lambda n=count, g=group, c=codec: codec_errors(rank, n, g, c)
        for codec in ("identity", "qsgd:bits=8"):
            tasks[f"uneven {codec}"] = lambda n=count, g=group, c=codec: rows_astray(rank, n, g, c)
        if count > 1:
            tasks["messages"] = lambda n=count, g=group: test_messages.passed_on(rank, n, g)
            for how in ("shape", "codec", "call", "sizes"):
                tasks[how] = lambda n=count, g=group, h=how: unnamed(rank, n, g, h)
        found |= {f"{name}, {count} ranks": task() for name, task in tasks.items()}
    return found


def codec_errors(rank: int, size: int, group: Any, codec: str) -> list[Any]:
    """Of every call and type, those that err by more than the codec may."""
    return [
        (str(dtype), name, error)
        for dtype, shape in test_calls.SAMPLES
        for name, error in test_calls.beyond(test_calls.lossy(rank, size, codec, dtype, shape, group)[0])
    ]


def rows_astray(rank: int, size: int, group: Any, codec: str) -> list[int]:
    """From whom other rows have come than were sent."""
    return [
        source
        for source, rows in enumerate(test_calls.uneven(rank, size, codec, group))
        if len(rows) != (source + rank) % 3
        or any(abs(x - 10.0 * source - rank) > 0.02 * (10 * source + rank) for row in rows for x in row)
    ]


def unnamed(rank: int, size: int, group: Any, how: str) -> list[str]:
    """What was said of calls that differ, unless it names a rank, and the next call goes well."""
    said, total = test_calls.differing(rank, size, how, group)
    return [] if "rank 0" in said and total == [size] * 3 else [said, str(total)]


JOBS: dict[str, Callable[..., Any]] = {
    "calls": calls_of_groups,
    "collectives": collectives,
    "requests": requests,
    "training": training,
    "struck": struck,
}


def main() -> None:
    torch.set_num_threads(1)
    backend, *wanted = sys.argv[1:]
    here = distcomp.init_process_group(backend, timeout_s=60)
    for job in wanted:
        name, *argument = job.split("=", 1)
        answer = JOBS[name](here.rank, here.size, *argument)
        print("\n" + json.dumps({"job": job, "rank": here.rank, "answer": answer}), flush=True)
    if wanted != ["struck"]:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
