"""What becomes of an optimizer's state when models are averaged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.attaching.slices import local
from distcomp.errors import DistcompError
from distcomp.layout import Layout

MeanOf = Callable[[Tensor, Layout], Tensor]
"""Asks all ranks for the mean of a flat buffer."""


def needed(optimizer: Optimizer | None) -> Optimizer:
    """The optimizer. Raises DistcompError where none was given."""
    if optimizer is None:
        raise DistcompError(
            "optimizer_state='reset' or 'average' needs the optimizer: distcomp.attach(model, optimizer, ...)"
        )
    return optimizer


def forget(optimizer: Optimizer | None, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let the optimizer begin anew: moments, momentum and step counts of these parameters are gone."""
    state = needed(optimizer).state
    for parameter in parameters.values():
        state.pop(parameter, None)


def average(
    optimizer: Optimizer | None,
    parameters: Mapping[str, nn.Parameter],
    mean: MeanOf,
    only: Collection[str] | None = None,
) -> None:
    """Replace every tensor of the optimizer's state that has its parameter's shape by the mean over ranks.

    ``only``: those of these names, ``exp_avg`` for instance.
    Where an optimizer of some rank has not stepped yet (a GradScaler skipped), none is averaged: ranks ask
    for the same.
    """
    state = needed(optimizer).state
    tensors = {
        f"{key}:{name}": local(value)
        for name, parameter in parameters.items()
        for key, value in sorted(state.get(parameter, {}).items())
        if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"
        if only is None or key in only
        if local(value).numel()
    }
    device = next(iter(parameters.values())).device
    ready = torch.full(
        (1,),
        float(all(parameter in state for parameter in parameters.values())),
        device=device,
        dtype=torch.float32,
    )
    if mean(ready, Layout.of([("ready", (1,))])).item() < 1 or not tensors:
        return
    layout = Layout.of((name, tuple(value.shape)) for name, value in tensors.items())
    buffer = torch.cat([value.detach().float().reshape(-1) for value in tensors.values()])
    for value, (_, piece) in zip(tensors.values(), layout.pieces(mean(buffer, layout)), strict=True):
        value.copy_(piece.view_as(value))
