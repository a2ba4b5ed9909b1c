"""What a model costs before and after its weights were described by fewer numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distcomp.errors import DistcompError
from distcomp.parametrize import bits, chain, parameters
from distcomp.parametrize.base import Parametrization
from distcomp.pruning.masks import unwrapped
from distcomp.structured.structure import LAYERS, Structure

BeforeAfter = tuple[float, float]
"""Before (the dense weight) and after."""


@dataclass(frozen=True)
class LayerCost:
    """One layer's weight and bias: numbers as before and after, and what the weight's chain is."""

    name: str
    chain: str
    parameters: BeforeAfter
    exchanged_bytes: BeforeAfter
    stored_bytes: BeforeAfter
    multiplications: BeforeAfter
    activation_bytes: float


@dataclass(frozen=True)
class Costs:
    """Of a whole model; ``print`` it. ``layers``: all that have parameters. Multiplications and the bytes of
    activations are of the example that was given, and zero where none was."""

    layers: tuple[LayerCost, ...]

    def total(self, what: str) -> BeforeAfter:
        """Before and after, of all layers: ``total("parameters")``."""
        rows = [getattr(layer, what) for layer in self.layers]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    @property
    def exchanged_bytes(self) -> int:
        """Of the gradient that a step exchanges uncompressed: 4 for each trained number, 2 in half
        precision."""
        return int(self.total("exchanged_bytes")[1])

    @property
    def activation_bytes(self) -> int:
        """Of what the layers of the model give for the example."""
        return int(sum(layer.activation_bytes for layer in self.layers))

    def __str__(self) -> str:
        head = f"{'layer':<24}{'weight':<22}" + "".join(f"{title:>22}" for title in COLUMNS.values())
        lines = [head]
        for layer in self.layers:
            lines.append(
                f"{layer.name:<24}{layer.chain:<22}"
                + "".join(_arrow(getattr(layer, what)) for what in COLUMNS)
            )
        lines.append(f"{'all':<46}" + "".join(_arrow(self.total(what)) for what in COLUMNS))
        if self.activation_bytes:
            lines.append(f"activations of the example: {self.activation_bytes:,} bytes")
        return "\n".join(lines)


COLUMNS = {
    "parameters": "parameters",
    "exchanged_bytes": "bytes of a gradient",
    "stored_bytes": "bytes at rest",
    "multiplications": "multiplications",
}


def _arrow(numbers: BeforeAfter) -> str:
    before, after = (f"{round(number):,}" for number in numbers)
    return f"{before if before == after else f'{before} -> {after}':>22}"


def summary(model: nn.Module, example: Any = None) -> Costs:
    """Parameters, bytes of a gradient, bytes at rest and (given an example input) multiplications and
    activations of every layer that has parameters: as a dense model, and as it is.

    What Canziani et al. (2016) compare networks by, and what a distributed step adds: the bytes that it
    exchanges before any method compresses them. Of an FFT, the products and the transforms are counted by a
    formula, as flop counters see neither. The model runs once on the example, in ``eval()``.

    Raises DistcompError for a model without parameters.
    """
    module = unwrapped(model)
    parts = [(name, part) for name, part in module.named_modules() if _own_tensors(part)]
    if not parts:
        raise DistcompError("the model has no parameters; there is nothing to sum up")
    shapes = _output_shapes(module, parts, example) if example is not None else {}
    return Costs(tuple(_row(name, part, shapes.get(name)) for name, part in parts))


def _own_tensors(part: nn.Module) -> list[str]:
    """The names of the parameters of a module itself, parametrized ones under their plain names."""
    if isinstance(part, parametrize.ParametrizationList | Parametrization):
        return []
    plain = [name for name, parameter in part._parameters.items() if parameter is not None]
    return [*plain, *getattr(part, "parametrizations", ())]


def _row(name: str, part: nn.Module, output: tuple[int, ...] | None) -> LayerCost:
    before, after = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for tensor in _own_tensors(part):
        weight: Tensor = getattr(part, tensor)
        theta = parameters(part, tensor)
        trained = [parameter for parameter in theta if parameter.requires_grad]
        dense_bytes = float(weight.numel() * weight.element_size())
        exchanged = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        for column, number in enumerate((weight.numel(), dense_bytes if trained else 0, dense_bytes)):
            before[column] += number
        stored = (sum(parameter.numel() for parameter in theta), exchanged, bits(part, tensor) / 8)
        for column, number in enumerate(stored):
            after[column] += number
    links = " ".join(type(link).__name__ for link in chain(part, "weight")) if _has_weight(part) else ""
    given = math.prod(output[1:]) if output else 0
    return LayerCost(
        name or "(model)",
        links,
        (before[0], after[0]),
        (before[1], after[1]),
        (before[2], after[2]),
        _multiplications(part, output),
        4.0 * given,
    )


def _has_weight(part: nn.Module) -> bool:
    return "weight" in _own_tensors(part)


def _multiplications(part: nn.Module, output: tuple[int, ...] | None) -> BeforeAfter:
    """Of one example."""
    if output is None or not isinstance(part, LAYERS):
        return 0.0, 0.0
    weight: Tensor = part.weight
    dims = weight.dim() - 2
    positions = math.prod(output[len(output) - dims :]) if dims else math.prod(output[1:-1])
    dense = weight.numel() * positions
    links = chain(part, "weight")
    if len(links) == 1 and isinstance(links[0], Structure):
        own = links[0].multiplications(part, positions)
        return float(dense), float(dense if own is None else own)
    return float(dense), float(dense)


@torch.no_grad()
def _output_shapes(
    module: nn.Module, parts: list[tuple[str, nn.Module]], example: Any
) -> dict[str, tuple[int, ...]]:
    """The shape of what each module gives, of the last time that it runs."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(part: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    hooks = [part.register_forward_hook(note(name)) for name, part in parts]
    was_training = module.training
    try:
        module.eval()
        module(example)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes
