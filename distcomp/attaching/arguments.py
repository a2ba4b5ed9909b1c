"""What ``attach`` is given, looked at before anything else: things in each other's places, things of another
kind."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer

from distcomp.attaching.target import Target
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.errors import DistcompError
from distcomp.methods import Method

CALL = "distcomp.attach(model, optimizer, method)"


def check_arguments(model: Any, optimizer: Any, method: Any, seed: Any, timeout_s: Any) -> None:
    """Raise DistcompError for an argument of a kind that its place does not take."""
    if not isinstance(model, nn.Module):
        raise DistcompError(f"the model is a {type(model).__name__} and no torch.nn.Module; write {CALL}")
    if isinstance(optimizer, str | Method | Averaging | MultiLevel):
        raise DistcompError(
            f"{optimizer!r} stands in the optimizer's place; write {CALL}, or name it: "
            f"distcomp.attach(model, method={optimizer!r})"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise DistcompError(
            f"the optimizer is a {type(optimizer).__name__} and no torch.optim.Optimizer; give the optimizer "
            "itself, or None"
        )
    if isinstance(method, Optimizer):
        raise DistcompError(f"an optimizer stands in the method's place; write {CALL}")
    if inspect.isroutine(method) or inspect.isclass(method):
        name = getattr(method, "__name__", "the method")
        raise DistcompError(f"{name} was not called; write distcomp.attach(model, optimizer, {name}(...))")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DistcompError(f"the seed is {seed!r}; give a whole number, the same on every rank")
    if timeout_s is not None and (not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf):
        raise DistcompError(
            f"timeout_s is {timeout_s!r}; give seconds, more than 0, or None for the process group's own "
            "timeout"
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Raise DistcompError for an optimizer that steps on none of the model's parameters."""
    if optimizer is None:
        return
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise DistcompError(
            f"the {type(optimizer).__name__} steps on no parameter of this model; give the optimizer that "
            "was made with this model's parameters (after fully_shard, where the model is sharded), or None"
        )


def warn_of_rounding(target: Target, method: Any) -> None:
    """Say once, on rank 0, where float64 is exchanged as float32: by all but PyTorch's own hooks."""
    if isinstance(method, str) or dist.get_rank(target.group) != 0:
        return
    parameters = target.module.named_parameters()
    trained = [p for name, p in parameters if p.requires_grad and name not in target.ignored]
    double = sum(parameter.dtype == torch.float64 for parameter in trained)
    if double:
        what = "gradients" if isinstance(method, Method) else "weights and buffers"
        warnings.warn(
            f"{double} of {len(trained)} parameters are float64, and are exchanged as float32: {what} are "
            "rounded to 24 bits, and infinite beyond 3.4e38; train in float32, or let DDP reduce them as "
            "they are (method 'ddp')",
            stacklevel=4,
        )
