"""Fixed-point networks in spite of the gradient mismatch: three proposals (Lin and Talathi 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from distcomp.compressors import FixedPoint
from distcomp.errors import DistcompError
from distcomp.parametrize import Parametrization
from distcomp.precision.convert import BitWidths, Quantizers, convert, converted
from distcomp.precision.noise import straight_through
from distcomp.precision.quantizer import FULL, WeightQuantizer


def gradual(
    model: nn.Module,
    activations: str | FixedPoint | None = "Q2.2",
    weights: str | FixedPoint | None = None,
    *,
    masked: bool = True,
    skip: tuple[str, ...] = ("first",),
) -> nn.Module:
    """Quantize inputs and weights to fixed point, to the nearest, with switches on the inputs.

    ::

        a = round(x)  on the grid of ``activations``, where switched on;    W = round(w)  (w: a float copy)

    Quantized inputs make the forward a staircase, while backward pretends that it is smooth: that mismatch
    adds up from layer to layer. The paper's three ways around it:

    1. ``set_activations(model, False)`` while training (with ``weights`` quantized), ``True`` afterwards;
    2. :func:`top_layers` leaves only the last layers to be trained below quantized activations;
    3. :func:`bottom_to_top` quantizes from the bottom up, and trains only what is above.

    ``masked`` lets no gradient through to what was clamped, which takes much of the mismatch away; False
    passes it on, as if forward were smooth throughout. With ``skip=("first",)`` the first layer sees its data
    as they are. None leaves activations or weights as they are.

    Source: Lin and Talathi, "Overcoming challenges in fixed point training of deep convolutional networks",
    2016. We differ: weights have a float copy.
    """
    activation_format = None if activations is None else FixedPoint.of(activations)
    weight_format = None if weights is None else FixedPoint.of(weights)
    bit_widths = BitWidths(
        weight_format.bits if weight_format else FULL, activation_format.bits if activation_format else FULL
    )

    def plan(name: str, layer: nn.Module) -> Quantizers:
        parameters: dict[str, Parametrization] = {"weight": Nearest(weight_format)} if weight_format else {}
        input_quantizer = Nearest(activation_format, masked) if activation_format else None
        return Quantizers(bit_widths, parameters, input_quantizer)

    return convert(model, plan, skip)


class Nearest(WeightQuantizer):
    """Rounding to the nearest of a format, which can be switched off.

    Where ``masked``, what is clamped passes no gradient.
    """

    def __init__(self, format: FixedPoint, masked: bool = True) -> None:
        super().__init__()
        self.format = format
        self.masked = masked
        self.on = True

    @property
    def width(self) -> float:
        """Of the format, while it is on."""
        return self.format.bits if self.on else FULL

    def decode(self, x: Tensor) -> Tensor:
        """``x`` rounded, or as it is."""
        if not self.on:
            return x
        inside = x.abs() <= self.format.half * self.format.spacing if self.masked else None
        return straight_through(x, self.format.round(x), inside)


def set_activations(model: nn.Module, on: bool) -> None:
    """Switch the quantization of inputs on or off in every layer."""
    for _, switch in _switches(model):
        switch.on = on


@dataclass(frozen=True)
class Phase:
    """One phase of a schedule: the activations of the first ``quantized`` layers are quantized, the parts
    named ``trained`` learn."""

    quantized: int
    trained: tuple[str, ...]


def bottom_to_top(model: nn.Module, update: str = "next") -> Iterator[Phase]:
    """Phase k: the activations of layers 1..k are quantized, and only what is above them learns.

    ::

        for phase in distcomp.precision.bottom_to_top(model):
            optimizer = ...(p for p in model.parameters() if p.requires_grad)
            train(model, optimizer, some_steps)

    ``update="next"`` trains layer k+1 alone, ``"above"`` all layers from k+1 up. So no gradient that is used
    has crossed a quantized activation. What stands between two layers (a norm) belongs to the layer before
    it. Afterwards every activation is quantized, and every parameter may learn again.

    Raises DistcompError for another ``update``, or a model that :func:`gradual` has not converted. With DDP,
    wrap the model anew in every phase: DDP looks at ``requires_grad`` once.
    """
    if update not in ("next", "above"):
        raise DistcompError(f"update is 'next' or 'above', not {update!r}")
    switches = _switches(model)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    owners = _owners(model, [name for name, _ in switches])
    try:
        for k in range(1, len(switches) + 1):
            for position, (_, switch) in enumerate(switches, start=1):
                switch.on = position <= k
            for name, parameter in model.named_parameters():
                learns = owners[name] == k if update == "next" else owners[name] >= k
                parameter.requires_grad_(before[name] and learns)
            trained = tuple(name for name, parameter_ in model.named_parameters() if parameter_.requires_grad)
            yield Phase(k, trained)
    finally:
        set_activations(model, True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def top_layers(model: nn.Module, count: int = 1) -> Phase:
    """Quantize every activation, and let only the last ``count`` layers learn: the second proposal.

    ``model.requires_grad_(True)`` undoes it. Raises DistcompError for a count that is not there.
    """
    switches = _switches(model)
    if not 1 <= count <= len(switches):
        raise DistcompError(f"the model has {len(switches)} converted layers, not {count}")
    set_activations(model, True)
    owners = _owners(model, [name for name, _ in switches])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(owners[name] > len(switches) - count)
    trained = tuple(name for name, parameter_ in model.named_parameters() if parameter_.requires_grad)
    return Phase(len(switches), trained)


def _switches(model: nn.Module) -> list[tuple[str, Nearest]]:
    switches = [
        (name, layer.input_quantizer)
        for name, layer in converted(model)
        if isinstance(layer.input_quantizer, Nearest)
    ]
    if not switches:
        raise DistcompError("no activation has a switch; call distcomp.precision.gradual(model) first")
    return switches


def _owners(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Of each parameter: how many converted layers begin at or before it (0: it lies below them all)."""
    owners, at = {}, 0
    for module_name, module in model.named_modules():
        if module_name in names:
            at = names.index(module_name) + 1
        for name, _ in module.named_parameters(prefix=module_name, recurse=False):
            owners[name] = at
    return owners
