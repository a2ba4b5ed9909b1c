"""How quantizers meet an ordinary model, and leave it again: parametrizations, hooks, and a projection.

A converted layer keeps its class of operation. Its weight is read through a parametrization, which stacks
with others (:mod:`distcomp.parametrize`); the latent tensor is :func:`latent_of` it.
``layer.input_quantizer`` quantizes what it is given, ``layer.output_quantizer`` what it gives (forward) and
the gradient that comes back (backward); ``layer.weight_projection`` puts latent tensors back where they
belong after each optimizer step (on a grid, into [-1, 1]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from distcomp.errors import DistcompError
from distcomp.parametrize import Parametrization, chain, latent, parameters
from distcomp.parametrize import install as install_parametrization
from distcomp.parametrize.chain import apply, removal
from distcomp.parametrize.registered import own_class
from distcomp.precision.quantizer import FULL

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLACES = ("input_quantizer", "output_quantizer", "weight_projection")
OWNER = "precision"


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
    parameters: dict[str, Parametrization] = field(default_factory=dict)
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
            f"skip names {sorted(unknown)}, which are no layers; those are: {', '.join(n for n, _ in every)}"
        )
    left = [(name, layer) for name, layer in every if name not in skipped]
    if not left:
        raise DistcompError("every layer is skipped; name fewer in skip, such as skip=()")
    for name, layer in left:
        if is_converted(layer):
            raise DistcompError(f"{name} is converted already; call distcomp.precision.remove(model) first")
    return left


def convert(model: nn.Module, plan: Plan, skip: tuple[str, ...]) -> nn.Module:
    """Give every layer that is not skipped its quantizers, in place."""
    planned = [(name, layer, plan(name, layer)) for name, layer in chosen(model, skip)]
    for name, layer, quantizers in planned:
        if quantizers.weight_projection is not None:
            _check_projection(name, layer, quantizers.weight_projection)
    for _, layer, quantizers in planned:
        install_quantizers(layer, quantizers)
    return model


def install_quantizers(layer: nn.Module, quantizers: Quantizers) -> None:
    """One layer's quantizers."""
    layer.bit_widths = quantizers.bit_widths  # type: ignore[assignment]
    layer.swapped = (type_before_parametrizations(layer), tuple(quantizers.attributes))  # type: ignore[assignment]
    if quantizers.kind is not None:
        own_class(layer, quantizers.kind)
        for name, value in quantizers.attributes.items():
            setattr(layer, name, value)
    for name, parametrization in quantizers.parameters.items():
        if _has(layer, name):
            install_parametrization(layer, name, parametrization)
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
    return hasattr(layer, "bit_widths")


def converted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that have quantizers."""
    return ((name, layer) for name, layer in layers(model) if is_converted(layer))


def remove(model: nn.Module, materialize: bool = True, *, densify: bool = False) -> nn.Module:
    """Take all quantizers off, in place: same classes, same names in ``state_dict`` as before they came.

    ``materialize`` leaves the quantized weights in the model, otherwise their latent ones. Activations and
    gradients are no longer quantized (to keep binary ones, see :func:`distcomp.precision.pack`). Does
    nothing to a layer that is not converted. Other parametrizations (masks, codebooks, structures) stay.

    Raises DistcompError, and changes nothing, where a structure or codebook below a quantizer cannot hold the
    quantized weights exactly: ``materialize=False`` keeps what it holds, ``densify=True`` the quantized
    weights, as many numbers as these are.
    """
    every = list(converted(model))
    removals = [
        removal(model, f"{path}.{name}" if path else name, OWNER, materialize=materialize, densify=densify)
        for path, layer in every
        for name in quantized(layer)
    ]
    apply(removals)
    for _, layer in every:
        for hook in layer.precision_hooks:  # type: ignore[union-attr]
            hook.remove()
        for attribute in PLACES:
            if hasattr(layer, attribute):
                delattr(layer, attribute)
        kind, added = layer.swapped  # type: ignore[misc]
        own_class(layer, kind)
        for name in ("bit_widths", "swapped", "precision_hooks", *added):
            delattr(layer, name)
    return model


def quantized(layer: nn.Module) -> list[str]:
    """The names of a layer's parameters that have a quantizer."""
    return [
        name
        for name in getattr(layer, "parametrizations", ())
        if any(_is_quantizer(link) for link in chain(layer, name))
    ]


def _is_quantizer(link: nn.Module) -> bool:
    return isinstance(link, Parametrization) and link.owner == OWNER


def latent_of(layer: nn.Module, name: str) -> Tensor | None:
    """The tensor that a parameter's quantizer is given (the parameter, unless others lie below), or else the
    parameter; None where there is none."""
    return latent(layer, name, OWNER) if _has(layer, name) else None


def _has(layer: nn.Module, name: str) -> bool:
    return name in getattr(layer, "parametrizations", ()) or layer._parameters.get(name) is not None


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

    def __init__(self, layer: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: a copied layer brings its own copy along
        self.projection = projection
        _RESTING.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _RESTING.add(self)

    @torch.no_grad()
    def project(self, owned: set[int] | None = None) -> None:
        """Apply the law to the tensors in ``owned`` (ids), or to all.

        A law about weights is one about what is stored where weights are numbers of that: not under a
        structure.
        """
        for name in quantized(self.layer):
            theta = parameters(self.layer, name)
            mine = [parameter for parameter in theta if owned is None or id(parameter) in owned]
            if not mine or not _holds_weights(type(self.layer).__name__, self.layer, name, self.projection):
                continue
            for parameter in mine:
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.copy_(self.projection(local))


def _check_projection(path: str, layer: nn.Module, projection: nn.Module) -> None:
    for name in ("weight", "bias"):
        if _has(layer, name):
            _holds_weights(path, layer, name, projection)


def _holds_weights(path: str, layer: nn.Module, name: str, projection: nn.Module) -> bool:
    """Whether what is stored are numbers of the weight. Raises DistcompError for a law that needs it."""
    for link in chain(layer, name):
        if _is_quantizer(link):
            break
        if not (isinstance(link, Parametrization) and link.selects):
            if getattr(projection, "needs_weights", False):
                raise DistcompError(
                    f"the {name} of {path} is stored as {type(link).__name__}, whose numbers are no "
                    "weights that could be kept on a grid; name the layer in skip, or use "
                    "distcomp.precision.gradual"
                )
            return False
    return True


_RESTING: WeakSet[WeightProjection] = WeakSet()


def _after_step(optimizer: Optimizer, arguments: object, options: object) -> None:
    if _RESTING:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
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
