"""FitNets' first stage: which regressor, and which part of the student is trained and sent in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distcomp.distill.taps import HEADS, Taps
from distcomp.distill.teachers import Batch, called, logits_of
from distcomp.errors import DistcompError
from distcomp.parametrize import evaluating
from distcomp.pruning.masks import unwrapped


def features_of(model: nn.Module, layer: str, batch: Batch) -> Tensor:
    """What a module gives for a batch, in evaluation and without a gradient."""
    taps = Taps(model, (layer,))
    try:
        with evaluating(model), torch.no_grad():
            # not called: that would be an iteration to whoever listens to the model
            inner = unwrapped(model)
            inner.forward(*batch) if isinstance(batch, tuple) else inner.forward(batch)
        return taps.taken()[layer]
    finally:
        taps.remove()


def regressor(student: nn.Module, guided: str, teacher: nn.Module, hint: str, batch: Batch) -> nn.Module:
    """A layer that brings the student's features to the shape of the teacher's.

    Linear for vectors (``[batch, n]``), a convolution for maps: of 1 x 1 where both are as large, otherwise
    of the kernel that makes the student's map as small as the teacher's (the paper's choice).

    Raises DistcompError for features of different kinds, and a student's map that is smaller.
    """
    ours, theirs = features_of(student, guided, batch), features_of(teacher, hint, batch)
    if ours.dim() == theirs.dim() == 2:
        return nn.Linear(ours.shape[1], theirs.shape[1], device=ours.device, dtype=ours.dtype)
    if ours.dim() == theirs.dim() == 4:
        height, width = (a - b + 1 for a, b in zip(ours.shape[2:], theirs.shape[2:], strict=True))
        if min(height, width) >= 1:
            return nn.Conv2d(
                ours.shape[1], theirs.shape[1], (height, width), device=ours.device, dtype=ours.dtype
            )
    raise DistcompError(
        f"no regressor brings {tuple(ours.shape)} of {guided!r} to {tuple(theirs.shape)} of {hint!r}; name "
        "layers of the same kind, the student's map at least as large as the teacher's"
    )


def freeze_above(student: nn.Module, guided: str, batch: Batch) -> Callable[[], None]:
    """Freeze what the module ``guided`` does not depend on: stage one neither trains nor sends it.

    Call it before DistributedDataParallel or ``fully_shard``, which then leave the rest out. Returns a
    function that thaws what was frozen; wrap the student anew for stage two.
    """
    taps = Taps(student, (guided,))
    inner = unwrapped(student)
    trained = {
        name: parameter
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and not name.startswith(f"{HEADS}.")  # a regressor sits on ``guided``
    }
    try:
        with evaluating(student), torch.enable_grad():
            inner.forward(*batch) if isinstance(batch, tuple) else inner.forward(batch)
            features = taps.taken()[guided]
    finally:
        taps.remove()
    if not features.requires_grad:
        raise DistcompError(f"{guided!r} depends on no trained parameter; name a layer further up")
    gradients = torch.autograd.grad(features.sum(), list(trained.values()), allow_unused=True)
    above = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    for name in above:
        inner.get_parameter(name).requires_grad_(False)

    def thaw() -> None:
        for name in above:  # by name: fully_shard puts other parameters in their places
            inner.get_parameter(name).requires_grad_(True)

    return thaw


def linear_bottleneck(layer: nn.Linear, rank: int) -> nn.Sequential:
    """``Linear(d, rank, bias=False)`` then ``Linear(rank, H)`` in the place of a wide ``Linear(d, H)``.

    As near to the layer as any product of that rank (its truncated singular value decomposition). A shallow
    student that mimics learns faster with it (Ba and Caruana, section 2.3).

    Raises DistcompError for a rank that is not in 1..min(d, H).
    """
    outputs, inputs = layer.weight.shape
    if not 1 <= rank <= min(outputs, inputs):
        raise DistcompError(f"a bottleneck of {inputs} x {outputs} has a rank in 1..{min(outputs, inputs)}")
    down = nn.Linear(inputs, rank, bias=False, device=layer.weight.device, dtype=layer.weight.dtype)
    up = nn.Linear(
        rank, outputs, bias=layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype
    )
    with torch.no_grad():
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        root = values[:rank].sqrt()
        down.weight.copy_(root[:, None] * right[:rank])
        up.weight.copy_(left[:, :rank] * root)
        if layer.bias is not None:
            up.bias.copy_(layer.bias)
    return nn.Sequential(down, up)


@torch.no_grad()
def standardisation(teacher: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each centred logit over a transfer set: what ``mimic`` divides by.

    Raises DistcompError where there is no batch.
    """
    with evaluating(teacher):
        logits = [logits_of(called(teacher, batch)).flatten(0, -2).double() for batch in batches]
    if not logits:
        raise DistcompError("there is no batch to standardise over; give those of the transfer set")
    rows = torch.cat(logits)
    rows = rows - rows.mean(-1, keepdim=True)
    return rows.mean(0).float(), rows.std(0, correction=0).clamp(min=1e-6).float()
