"""What was asked for: the method as an object, and what it cannot serve, named with its reason."""

from __future__ import annotations

import os

from torch import nn
from torch.optim.optimizer import Optimizer

from distcomp.attaching.averageable import refuse_averaging
from distcomp.attaching.fsdp import refuse_sharded
from distcomp.attaching.target import Target
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.builtin_hooks import is_builtin
from distcomp.errors import DistcompError
from distcomp.methods import METHODS, Method, parse
from distcomp.private_torch import bypasses_hooks, steps_in_a_hook, steps_in_backward

Chosen = Method | Averaging | MultiLevel | str


def chosen_method(method: Chosen | None) -> Chosen:
    """The method object; PyTorch's own stay strings."""
    if method is None:
        method = os.environ.get("DISTCOMP_METHOD")
        if method is None:
            raise DistcompError(
                "no method was given; pass one, such as distcomp.qsgd(bits=4), or set DISTCOMP_METHOD"
            )
    if is_builtin(method):
        return method
    if isinstance(method, str):
        method = parse(method)
    if not isinstance(method, Method | Averaging | MultiLevel):
        raise DistcompError(
            f"{method!r} is no method; pass one of "
            f"{', '.join(f'distcomp.{name}(...)' for name in sorted(METHODS))}"
        )
    return method


def refuse(target: Target, chosen: Chosen, optimizer: Optimizer | None) -> None:
    """What cannot be served, named with its reason."""
    for name, parameter in target.module.named_parameters():
        if parameter.is_complex() and parameter.requires_grad and name not in target.ignored:
            raise DistcompError(
                f"{name} is complex, which is neither averaged nor compressed; keep it as two real tensors "
                "(torch.view_as_real)"
            )
        if steps_in_backward(parameter):
            raise DistcompError(
                f"an optimizer steps on {name} within the backward (_apply_optimizer_in_backward), before "
                "its gradient is agreed on; step after the backward"
            )
    if target.shards is not None:
        refuse_sharded(chosen, target)
    if isinstance(chosen, Averaging | MultiLevel):
        refuse_averaging(target, chosen, optimizer)
        return
    if isinstance(chosen, Method):
        chosen.check(optimizer)
    if target.shards is not None:
        return
    model = target.as_ddp()
    for name, part in model.module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise DistcompError(
                f"{name} has sparse gradients, which DDP reduces outside its buckets; make it sparse=False"
            )
    if bypasses_hooks(model):
        raise DistcompError(
            "torch.compile's python_reducer bypasses communication hooks; set "
            "torch._dynamo.config.optimize_ddp = 'ddp_optimizer' before wrapping the model"
        )
    if getattr(model, "skip_all_reduce_unused_params", False):
        raise DistcompError(
            "skip_all_reduce_unused_params=True skips buckets for which other ranks wait; wrap the model "
            "with find_unused_parameters=True alone"
        )
    if optimizer is not None and steps_in_a_hook(optimizer):
        raise DistcompError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside a communication hook of its own; "
            "set overlap_with_ddp=False"
        )
