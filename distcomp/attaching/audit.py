"""Which collectives does a training step run, for whom, in which type, and what do they send?

A dispatch mode sees every operation of ``torch.distributed`` that is called while it is on, whoever calls
it: DistributedDataParallel's reducer, FSDP2, DTensor, or the script. Nothing need be attached. What distcomp
sends over groups of its own is taken from its ledgers.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from distcomp.attaching.audit_report import Audit, Collective
from distcomp.attaching.groups import is_own
from distcomp.private_torch import NO_BACKWARD, backward_number, fsdp_caller, process_group
from distcomp.runtime.ledger import LEDGERS

if TYPE_CHECKING:
    from distcomp.network.qdisc import QueueCount

C10D = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "allgather_coalesced_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
}
"""Operations, what they are, and which argument is sent. Those that receive, and barriers, send nothing."""
FUNCTIONAL = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
"""Of ``_c10d_functional``, without the endings ``_``, ``_out`` and ``_coalesced``: the first is sent."""


class _Dispatched(TorchDispatchMode):
    """Counts the collectives of this thread, and of the backward that it runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Collective] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # a DTensor, whose collectives come by themselves
        namespace = getattr(func, "namespace", "")
        if namespace in ("c10d", "_c10d_functional"):
            seen = _of_c10d(func, args) if namespace == "c10d" else _functional(func, args)
            if seen is not None:
                self.calls[seen] += 1
        return func(*args, **(kwargs or {}))


def _of_c10d(func: Any, args: tuple[Any, ...]) -> Collective | None:
    kind, place = C10D.get(func.overloadpacket.__name__, (None, 0))
    if kind is None:
        return None
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            with suppress(RuntimeError, TypeError):  # other objects say how to reduce
                return _collective(kind, args[place], dist.ProcessGroup.unbox(argument))
    return None


def _functional(func: Any, args: tuple[Any, ...]) -> Collective | None:
    name = func.overloadpacket.__name__.removesuffix("_out").removesuffix("_").removesuffix("_coalesced")
    names = [argument for argument in args if isinstance(argument, str)]
    if name not in FUNCTIONAL or not names:
        return None
    return _collective(FUNCTIONAL[name], args[0], process_group(names[-1]))


def _collective(kind: str, sent: Any, group: dist.ProcessGroup) -> Collective | None:
    tensors = list(_tensors(sent))
    if not tensors or is_own(group):
        return None
    caller, dtype = fsdp_caller(), tensors[0].dtype
    role, asked = "other", None
    if caller is not None:
        role = "weights" if kind == "all_gather" else "gradients"
        asked = caller.param_dtype if role == "weights" else caller.reduce_dtype
    elif kind in ("all_reduce", "reduce_scatter") and backward_number() != NO_BACKWARD:
        role = "gradients"
    return Collective(
        kind,
        role,
        caller.module if caller is not None else "",
        dtype,
        dist.get_world_size(group),
        dist.get_backend(group),
        sum(tensor.numel() for tensor in tensors),
        asked,
    )


def _tensors(sent: Any) -> Iterator[Tensor]:
    if isinstance(sent, Tensor):
        yield sent
    elif isinstance(sent, list | tuple):
        for one in sent:
            yield from _tensors(one)


@contextmanager
def audit() -> Iterator[Audit]:
    """See what training steps send, and what of it could be less::

        with distcomp.audit() as seen:
            for x, y in batches:
                loss(model(x), y).backward()
                optimizer.step()
        print(seen)

    Every collective of this thread by kind, role, module, type and ranks; beside it what distcomp's ledgers
    have counted and, on an emulated network, what the interface has sent. Bytes are those of this rank, by
    the formulas of :func:`distcomp.attaching.audit_report.sent_in_call_bytes`. Steps are those of the
    optimizer that stepped most. Complete when the context ends.

    Meanwhile what ``torch.compile`` has compiled runs as it is written (its stance is ``force_eager``): a
    graph would call its collectives past every mode. They are the same ones.
    """
    mode, steps = _Dispatched(), Counter[int]()

    def stepped(optimizer: Optimizer, arguments: Any, options: Any) -> None:
        steps[id(optimizer)] += 1

    seen = Audit()
    hook = register_optimizer_step_post_hook(stepped)
    ledgers, counted = {one: Counter(one.sent_bytes) for one in LEDGERS}, _counted()
    try:
        with _uncompiled(), mode:
            yield seen
    finally:
        hook.remove()
        after = _counted()
        seen.steps = max(steps.values(), default=1)
        seen.calls = dict(mode.calls)
        for ledger in {*ledgers, *LEDGERS}:
            seen.ledger_bytes.update(ledger.sent_bytes - ledgers.get(ledger, Counter()))
        if counted is not None and after is not None:
            seen.interface_bytes = after.sent_bytes - counted.sent_bytes
            seen.interface_packets = after.sent_packets - counted.sent_packets


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled code runs as it is written. Who has not imported the compiler, for seconds, has none."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _counted() -> QueueCount | None:
    """What the queue of this rank's own interface has counted, if it has one."""
    device = os.environ.get("DISTCOMP_DEVICE")
    if not device:
        return None
    from distcomp.network.qdisc import read_qdisc  # only on an emulated network, not with every import

    return read_qdisc(device)
