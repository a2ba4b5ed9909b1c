"""How quantizers meet an ordinary model, and leave it again: parametrizations, hooks, and a projection.

A converted layer keeps its class of operation. Its weight is read through a parametrization (the latent
tensor is ``layer.parametrizations.weight.original``); ``layer.input_quantizer`` quantizes what it is given,
``layer.output_quantizer`` what it gives (forward) and the gradient that comes back (backward);
``layer.weight_projection`` puts latent tensors back where they belong after each optimizer step (on a grid,
into [-1, 1]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from distcomp.errors import DistcompError
from distcomp.parametrized import own_class

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLACES = ("arriving", "leaving", "resting")
FULL = 32


@dataclass(frozen=True)
class BitWidths:
    """Bits of a layer's numbers: weights, what arrives, gradients of what leaves."""

    weights: float = FULL
    activations: float = FULL
    gradients: float = FULL


@dataclass
class Quantizers:
    """What one layer gets. ``parameters`` are parametrizations by the parameter's name."""

    bit_widths: BitWidths
    parameters: dict[str, nn.Module] = field(default_factory=dict)
    input_quantizer: nn.Module | None = None
    output_quantizer: nn.Module | None = None
    weight_projection: nn.Module | None = None
    """What a latent parameter becomes after each optimizer step."""
    kind: type[nn.Module] | None = None
    """The class that computes in the place of the layer's own, with ``attributes``."""
    attributes: dict[str, Any] = field(default_factory=dict)


Plan = Callable[[str, nn.Module], Quantizers]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear and convolution layers of a model, in the order of their definition."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, LAYERS))


def chosen(model: nn.Module, skip: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """The layers but for those that ``skip`` names; ``first`` and ``last`` stand for what they say.

    Raises DistcompError where nothing is left, a name is no layer's, or a layer is converted already.
    """
    every = list(layers(model))
    if not every:
        raise DistcompError("the model has no Linear or Conv layer; there is nothing to convert")
    skipped = {{"first": every[0][0], "last": every[-1][0]}.get(name, name) for name in skip}
    if unknown := skipped - {name for name, _ in every}:
        raise DistcompError(
            f"keep names {sorted(unknown)}, which are no layers; those are: {', '.join(n for n, _ in every)}"
        )
    left = [(name, layer) for name, layer in every if name not in skipped]
    if not left:
        raise DistcompError("every layer is kept; name fewer in keep, such as keep=()")
    for name, layer in left:
        if is_converted(layer):
            raise DistcompError(f"{name} is converted already; call distcomp.precision.remove(model) first")
    return left


def convert(model: nn.Module, plan: Plan, skip: tuple[str, ...]) -> nn.Module:
    """Give every layer that is not kept its quantizers, in place."""
    planned = [(layer, plan(name, layer)) for name, layer in chosen(model, skip)]
    for layer, quantizers in planned:
        install(layer, quantizers)
    return model


def install(layer: nn.Module, quantizers: Quantizers) -> None:
    """One layer's quantizers."""
    layer.bit_widths = quantizers.bit_widths  # type: ignore[assignment]
    layer.swapped = (type(layer), tuple(quantizers.attributes))  # type: ignore[assignment]
    if quantizers.kind is not None:
        layer.__class__ = quantizers.kind
        for name, value in quantizers.attributes.items():
            setattr(layer, name, value)
    for name, parametrization in quantizers.parameters.items():
        if getattr(layer, name) is not None:
            parametrization.to(getattr(layer, name).device)
            unsafe = getattr(parametrization, "unsafe", False)
            parametrize.register_parametrization(layer, name, parametrization, unsafe=unsafe)
    hooks = []
    if quantizers.input_quantizer is not None:
        layer.input_quantizer = quantizers.input_quantizer.to(_device(layer))
        hooks.append(layer.register_forward_pre_hook(_quantize_input))
    if quantizers.output_quantizer is not None:
        layer.output_quantizer = quantizers.output_quantizer.to(_device(layer))
        hooks.append(layer.register_forward_hook(_quantize_output))
    if quantizers.weight_projection is not None:
        layer.weight_projection = WeightProjection(layer, quantizers.weight_projection)
        project(layer)
    layer.precision_hooks = hooks  # type: ignore[assignment]


def is_converted(layer: nn.Module) -> bool:
    """Whether the layer has quantizers."""
    return hasattr(layer, "widths")


def converted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that have quantizers."""
    return ((name, layer) for name, layer in layers(model) if is_converted(layer))


def remove(model: nn.Module, materialize: bool = True) -> nn.Module:
    """Give back a plain model, in place: same classes, same names in ``state_dict``.

    ``materialize`` leaves the quantized weights in it, otherwise their latent ones. Activations and gradients
    are no longer quantized (to keep binary ones, see :func:`distcomp.precision.pack`). Does nothing to a
    layer that is not converted.
    """
    for _, layer in list(converted(model)):
        for hook in layer.precision_hooks:  # type: ignore[union-attr]
            hook.remove()
        if parametrize.is_parametrized(layer):
            was_training = layer.training
            own_class(layer)
            layer.eval()
            for name in list(layer.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, name, leave_parametrized=materialize)
            layer.train(was_training)
            for name in ("weight", "bias"):  # in the order they had
                parameter = getattr(layer, name)
                delattr(layer, name)
                layer.register_parameter(name, parameter)
        for place in PLACES:
            if hasattr(layer, place):
                delattr(layer, place)
        layer.__class__, added = layer.swapped  # type: ignore[misc]
        for name in ("widths", "swapped", "precision_hooks", *added):
            delattr(layer, name)
    return model


def latent_of(layer: nn.Module, name: str) -> Tensor | None:
    """The tensor behind a parametrized parameter, or the parameter itself."""
    if parametrize.is_parametrized(layer, name):
        behind: Tensor = layer.parametrizations[name].original  # type: ignore[index, union-attr]
        return behind
    own: Tensor | None = getattr(layer, name, None)
    return own


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _quantize_input(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    input_quantizer: Any = layer.input_quantizer
    return (input_quantizer(arguments[0]), *arguments[1:])


def _quantize_output(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    output_quantizer: Any = layer.output_quantizer
    left: Tensor = output_quantizer(output)
    return left


class WeightProjection(nn.Module):
    """Puts a layer's latent tensors back after each optimizer step, whichever optimizer owns them."""

    layer: Any

    def __init__(self, layer: nn.Module, law: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: a copied layer brings its own copy along
        self.law = law
        _RESTING.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _RESTING.add(self)

    @torch.no_grad()
    def project(self, owned: set[int] | None = None) -> None:
        """Apply the law to the tensors in ``owned`` (ids), or to all."""
        for name in self.layer.parametrizations:
            latent = latent_of(self.layer, name)
            if latent is not None and (owned is None or id(latent) in owned):
                local = latent.to_local() if hasattr(latent, "to_local") else latent
                local.copy_(self.law(local))


_RESTING: WeakSet[WeightProjection] = WeakSet()


def _after_step(optimizer: Optimizer, arguments: object, options: object) -> None:
    if _RESTING:
        owned = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for weight_projection in list(_RESTING):
            weight_projection.project(owned)


register_optimizer_step_post_hook(_after_step)


def project(model: nn.Module) -> None:
    """Put latent tensors back on their grid, or into their range, now.

    Every ``torch.optim`` optimizer does so after its step; call this after an update made by other means.
    """
    for part in model.modules():
        if isinstance(part, WeightProjection):
            part.project()
