"""What of PyTorch is used that has no public name: each here, once, with its reason.

A test names each of these where a new version of PyTorch has moved it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

NO_BACKWARD = -1


def backward_number() -> int:
    """The number of the backward that this thread is inside of; :data:`NO_BACKWARD` outside.

    Hooks may ask for what must wait until a backward is over, and no public call says whether they run in
    one.
    """
    number: int = torch._C._current_graph_task_id()
    return number


def at_backward_end(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward that this thread is inside of has ended, before ``backward()``
    returns.

    DistributedDataParallel and FSDP learn of it in this way; public hooks see gradients, never the end.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def version_of(tensor: Tensor) -> int:
    """How many operations have changed the tensor in place, which autograd compares and no public call tells;
    0 for tensors of the inference mode, which do not count."""
    version: int = 0 if tensor.is_inference() else tensor._version
    return version


def profiler_runs() -> bool:
    """Whether a profiler records, on whatever thread: the public calls tell of the own thread alone."""
    return bool(torch.autograd.profiler._is_profiler_enabled)


def inside_compiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` is wrapped around, or the model itself: the wrapper names it by a
    private attribute alone."""
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def bypasses_hooks(ddp: nn.Module) -> bool:
    """Whether torch.compile's ``python_reducer`` carries this model's gradients, past every hook: chosen by a
    setting that may have changed since, and kept on the model."""
    return bool(getattr(ddp, "_use_python_reducer", False))


def steps_in_a_hook(optimizer: Optimizer) -> bool:
    """Whether this is a ZeroRedundancyOptimizer that steps inside a hook of its own: its argument is kept
    under a private name alone."""
    return bool(getattr(optimizer, "_overlap_with_ddp", False))


@dataclass(frozen=True)
class FSDPGroup:
    """Parameters that FSDP2 gathers and reduces as one flat buffer."""

    members: tuple[tuple[nn.Module, str], ...]
    """Each parameter's module and its name there, in the order of the buffer."""


def fsdp_group(module: nn.Module) -> FSDPGroup | None:
    """What FSDP2 gathers together with ``module``; equal for modules that were wrapped as a list.

    ``fully_shard([norm, output])`` makes one buffer of two modules, and nothing public tells of which or in
    what order. None where FSDP keeps no parameter of its own for the module.

    Raises ValueError where the module has several, over different meshes.
    """
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = _param_groups(state)
    if len(groups) > 1:
        raise ValueError(f"FSDP gathers its parameters in {len(groups)} groups")
    if not groups:
        return None
    infos = [parameter._module_info for parameter in groups[0].fsdp_params]
    return FSDPGroup(tuple((info.module, info.param_name) for info in infos))


def fsdp_divide_factor(module: nn.Module) -> float | None:
    """What was given to ``set_gradient_divide_factor``, which has no getter; None where FSDP takes the
    mean."""
    groups = _param_groups(module._get_fsdp_state())  # type: ignore[operator]
    factor: float | None = groups[0].gradient_divide_factor if groups else None
    return factor


def fsdp_accumulates(model: nn.Module) -> bool:
    """Whether an FSDP2 model was told ``set_requires_gradient_sync(False)``, which has no getter."""
    if not hasattr(inside_compiled(model), "_get_fsdp_state"):
        return False
    states = [part._get_fsdp_state() for part in model.modules() if hasattr(part, "_get_fsdp_state")]  # type: ignore[operator]
    groups = [group for state in states for group in _param_groups(state)]
    return bool(groups) and not any(group.reduce_grads for group in groups)


@dataclass(frozen=True)
class FSDPCaller:
    """The FSDP2 module on whose behalf a collective runs, and the types that it was told to compute in."""

    module: str
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None


def fsdp_caller() -> FSDPCaller | None:
    """Who called, if it was FSDP2. No collective says for whom it is; the frames that lead to it do."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller: Any = frame.f_locals.get("self") if frame.f_code.co_filename.endswith(_FSDP_FILE) else None
        if type(caller).__name__ == "FSDPParamGroup":
            return FSDPCaller(caller._module_fqn or "root", *_types_asked_for(caller))
        frame = frame.f_back
    return None


_FSDP_FILE = "_fsdp_param_group.py"


def _types_asked_for(group: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The policy's types of weights and of gradients; None where it leaves them, or parameters differ.

    A group has one policy up to 2.14, where gradients follow the weights' type. Since 2.15 each parameter has
    one, and gradients follow the parameter itself.
    """
    if hasattr(group, "mp_policy"):
        policy = group.mp_policy
        return policy.param_dtype, policy.reduce_dtype or policy.param_dtype
    policies = [parameter.mp_policy for parameter in group.fsdp_params]
    computed, reduced = {one.param_dtype for one in policies}, {one.reduce_dtype for one in policies}
    return (
        computed.pop() if len(computed) == 1 else None,
        reduced.pop() if len(reduced) == 1 else None,
    )


@dataclass(frozen=True)
class FSDPParameter:
    """A parameter as FSDP2 holds it: its name in the model, where it lives, and its shape as a whole."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FSDPExchange:
    """FSDP2 gathers (``gather``) or reduces (``reduce``) some parameters, in ``dtype``."""

    kind: str
    parameters: tuple[FSDPParameter, ...]
    dtype: torch.dtype
    device: torch.device


@contextmanager
def fsdp_exchanges(listen: Callable[[FSDPExchange], None]) -> Iterator[None]:
    """Until it ends, ``listen`` is told of whatever FSDP2 gathers or reduces, also on the only rank.

    On one rank FSDP calls no collective, replaced or not, and its hooks around a module do not say whether it
    gathers there.
    """
    fsdp = import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")  # takes seconds
    unshard, reduce = fsdp.FSDPParamGroup.unshard, fsdp.foreach_reduce

    def unsharding(group: Any, *arguments: Any, **options: Any) -> None:
        before = group._all_gather_result
        unshard(group, *arguments, **options)
        if before is None and group._all_gather_result is not None:
            listen(_fsdp_exchange("gather", group.fsdp_params, group.device))

    def reducing(fsdp_params: Any, *arguments: Any, **options: Any) -> Any:
        listen(_fsdp_exchange("reduce", fsdp_params, fsdp_params[0].sharded_param.device))
        return reduce(fsdp_params, *arguments, **options)

    with (
        mock.patch.object(fsdp.FSDPParamGroup, "unshard", unsharding),
        mock.patch.object(fsdp, "foreach_reduce", reducing),
    ):
        yield


def _fsdp_exchange(kind: str, params: Any, device: torch.device) -> FSDPExchange:
    first, own = params[0], [param._module_info for param in params]
    computed = first.param_dtype or first.orig_dtype
    return FSDPExchange(
        kind,
        tuple(
            FSDPParameter(param._param_fqn or info.param_name, info.module, tuple(param._orig_size))
            for param, info in zip(params, own, strict=True)
        ),
        computed if kind == "gather" else _reduced_in(first, computed),
        device,
    )


def _reduced_in(parameter: Any, computed: torch.dtype) -> torch.dtype:
    """The type of a parameter's gradients where FSDP2 reduces them: since 2.15 it says so itself."""
    told: torch.dtype | None = getattr(parameter, "unsharded_grad_dtype", None)
    return told or parameter.reduce_dtype or computed


def process_group(name: str) -> Any:
    """The process group that a functional collective names."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a name, too


def name_of(group: Any) -> str:
    """The name of a process group, also where its backend keeps none (mpi4py): ``group_name`` then raises."""
    c10d = import_module("torch.distributed.distributed_c10d")
    name: str = c10d._world.pg_names[group]
    return name


@contextmanager
def next_group_named(name: str) -> Iterator[None]:
    """Inside, a new process group that its members alone make is called ``name``.

    torch's own name of it counts the groups that the rank is in. Ranks that are in other numbers of groups,
    such as the middle stage of a pipeline of pairs, name one group differently, and wait for each other.
    """
    c10d = import_module("torch.distributed.distributed_c10d")
    with mock.patch.object(c10d, "_process_group_name", return_value=name):
        yield


def _param_groups(state: Any) -> list[Any]:
    """One for each mesh that parameters of the module are sharded over."""
    return list(state._fsdp_param_groups)


def timeout_of(group: Any) -> timedelta | None:
    """How long a process group's collectives wait, where its backend tells; None elsewhere. A public call
    sets it, and none asks for it."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        patience = getattr(options, "_timeout", None)
        if isinstance(patience, timedelta):
            return patience
    return None


def joins(ddp: Any) -> bool:
    """Whether this forward runs within ``ddp.join()``: the context tells nobody in public."""
    return bool(ddp._join_config.enable)


def steps_in_backward(parameter: Any) -> bool:
    """Whether an optimizer steps on this parameter within the backward: ``_apply_optimizer_in_backward`` is
    private itself, and so is its mark."""
    return hasattr(parameter, "_in_backward_optimizers")


def ddp_ignores(model: nn.Module, names: Iterable[str]) -> None:
    """Tell DistributedDataParallel, before it is made, which parameters it leaves alone: it reads this
    attribute, and no public call sets it.

    Its reducer asks for ``{module}.{name}``, which of the model's own parameters is ``.{name}``; all else
    that it does asks for the name alone."""
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    told = [form for name in names for form in ((name,) if "." in name else (name, f".{name}"))]
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys([*known, *told]))  # type: ignore[assignment]


def storage_is_shared(storage: torch.UntypedStorage) -> bool:
    """Whether a tensor still lies in memory that the caller holds as a storage: the count of its users has no
    public name, and Python's count does not see tensors that DistributedDataParallel holds."""
    users: int = torch._C._storage_Use_Count(storage._cdata)
    return users > 1
