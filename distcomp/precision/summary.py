"""What a model's numbers weigh: bits per layer, memory, and the share of operations at each width."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize import bits as stored_bits
from distcomp.parametrize import chain, parameters
from distcomp.precision.convert import BitWidths, latent_of, layers, quantized


@dataclass(frozen=True)
class LayerSummary:
    """One layer: its widths, its parameters, what they take at those widths, its share of multiplications."""

    name: str
    bit_widths: BitWidths
    numel: int
    bytes: int
    operations: int


@dataclass(frozen=True)
class Summary:
    """Of a whole model; ``print`` it. Operations are counted where an example input was given."""

    layers: tuple[LayerSummary, ...]
    other_bytes: int
    float_bytes: int

    @property
    def bytes(self) -> int:
        """Parameters at their widths, those of other parts (norms) in float32."""
        return sum(layer.bytes for layer in self.layers) + self.other_bytes

    @property
    def share(self) -> dict[tuple[float, float], float]:
        """Of the multiplications: the share at each (weight bits, activation bits)."""
        counts: Counter[tuple[float, float]] = Counter()
        for layer in self.layers:
            counts[layer.bit_widths.weights, layer.bit_widths.activations] += layer.operations
        total = counts.total()
        return {bit_widths: count / total for bit_widths, count in counts.items()} if total else {}

    def __str__(self) -> str:
        lines = [f"{'layer':<28}{'weights':>9}{'inputs':>8}{'gradients':>11}{'numbers':>12}{'bytes':>12}"]
        for layer in self.layers:
            bits = layer.bit_widths
            lines.append(
                f"{layer.name:<28}{bits.weights:>9g}{bits.activations:>8g}{bits.gradients:>11g}"
                f"{layer.numel:>12,}{layer.bytes:>12,}"
            )
        lines.append(
            f"{self.bytes:,} bytes, {self.float_bytes / max(1, self.bytes):.1f} x fewer than float32"
        )
        lines += [
            f"{part:.1%} of multiplications at {w:g} x {a:g} bits" for (w, a), part in self.share.items()
        ]
        return "\n".join(lines)


def summary(model: nn.Module, example: Any = None) -> Summary:
    """Bits, bytes and, given an example input, operations of every Linear and Conv layer.

    Biases of layers whose weights are quantized otherwise than on a grid count as float32. The model is run
    once on the example, in ``eval()``.

    Raises DistcompError where the model has no such layer.
    """
    named = list(layers(model))
    if not named:
        raise DistcompError("the model has no Linear or Conv layer; there is nothing to sum up")
    operations = _operations(model, example) if example is not None else {}
    rows = [_row(name, layer, operations.get(name, 0)) for name, layer in named]
    everything = sum(parameter.numel() for parameter in model.parameters())
    return Summary(
        tuple(rows),
        4 * (everything - sum(row.numel for row in rows)),
        4 * everything,
    )


def _row(name: str, layer: nn.Module, operations: int) -> LayerSummary:
    bit_widths = getattr(layer, "bit_widths", BitWidths())
    bias = latent_of(layer, "bias")
    weights = sum(parameter.numel() for parameter in parameters(layer, "weight"))
    bias_numel = 0 if bias is None else bias.numel()
    if len(chain(layer, "weight")) > len({"weight"} & {*quantized(layer)}):
        bits = stored_bits(layer, "weight")
    else:
        bits = weights * bit_widths.weights
    bits += bias_numel * (bit_widths.weights if "bias" in quantized(layer) else 32)
    return LayerSummary(name, bit_widths, weights + bias_numel, -(-int(bits) // 8), operations)


@torch.no_grad()
def _operations(model: nn.Module, example: Any) -> dict[str, int]:
    """Multiplications of each layer in one forward."""
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            weight = latent_of(layer, "weight")
            assert weight is not None
            per_output = weight[0].numel()
            counts[name] = counts.get(name, 0) + output.numel() * per_output

        return hook

    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers(model)]
    was_training = model.training
    try:
        model.eval()
        model(example)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return counts
