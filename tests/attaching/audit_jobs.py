"""What ranks do to test the audit: plain DDP, FSDP2 and HSDP models, with nothing attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.attaching.audit_report import Audit

WIDTH = 32


class Layer(nn.Linear):
    """PyTorch's own forward is none that torch.compile takes alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(WIDTH, WIDTH, bias=False), Layer(WIDTH, WIDTH, bias=False))


def model_of(kind: str, size: int, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    model = network()
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (size,))
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    for part in (*model, model):
        fully_shard(part, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, WIDTH)).square().mean().backward()
        optimizer.step()


def told(seen: Audit) -> dict[str, Any]:
    return {**seen.as_dict(), "text": str(seen)}


class WideGather:
    """An imitation of a gather that was meant to run in bfloat16: it casts "for safety", and nobody sees."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        wide = torch.empty(output_tensor.shape, dtype=torch.float32)
        dist.all_gather_into_tensor(wide, input_tensor.float(), group)
        output_tensor.copy_(wide)


# ------------------------------------------------------------------------------------------------ jobs


def audited(rank: int, size: int, kind: str, attached: tuple[str, str] | None = None) -> dict[str, Any]:
    """Three steps after two, with nothing attached or with a method and ``weights=``."""
    model = model_of(kind, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = None
    if attached is not None:
        handle = distcomp.attach(model, optimizer, attached[0], weights=attached[1])
    train(model, optimizer, 2)
    with handle.audit() if handle is not None else distcomp.audit() as seen:
        train(model, optimizer, 3)
    if handle is not None:
        handle.detach()
    return told(seen)


def compiled(rank: int, size: int, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of three steps with every layer compiled by itself, and as it is."""
    found = []
    for asked in (True, False):
        model = model_of(kind, size)
        for part in model.modules():
            if asked and isinstance(part, Layer):
                part.compile(backend="eager", fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, 2)
        with distcomp.audit() as seen:
            train(model, optimizer, 3)
        found.append(told(seen))
    return found[0], found[1]


def in_a_graph(rank: int, size: int) -> tuple[dict[str, Any], bool]:
    """A collective inside of one graph, audited; and whether the function is compiled again afterwards."""
    import torch.distributed._functional_collectives as functional

    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def doubled(x: Tensor) -> Tensor:
        return functional.all_reduce(2 * x, "sum", dist.group.WORLD) + 1

    run = torch.compile(doubled, backend=backend, fullgraph=True)
    run(torch.ones(8))
    with distcomp.audit() as seen:
        run(torch.ones(8))
    made = len(graphs)
    run(torch.ones(8, 2))
    return told(seen), made == 1 and len(graphs) == 2


def gathered_wide(rank: int, size: int, wide: bool) -> dict[str, Any]:
    """FSDP2 in bfloat16, whose first layer is gathered by somebody's own code."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = model_of("fsdp", size, policy)
    if wide:
        first = model[0]
        assert isinstance(first, FSDPModule)
        first.set_custom_all_gather(WideGather())
    with distcomp.audit() as seen:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    return told(seen)


def other_collectives(rank: int, size: int) -> dict[str, Any]:
    """The script's own, public and functional, and DTensor's."""
    import torch.distributed._functional_collectives as functional
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    sharded = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
    with distcomp.audit() as seen:
        dist.all_reduce(torch.ones(10))
        functional.all_reduce(torch.ones(20), "sum", mesh).wait()
        sharded.full_tensor()
        dist.barrier()
    return told(seen)
