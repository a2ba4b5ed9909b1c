"""What all structures are: parametrizations whose theta is fewer numbers than the weight, and which may
compute with theta itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize import Order, Parametrization, Storage, chain, install, parameters
from distcomp.parametrize.base import Tensors
from distcomp.parametrize.registered import registered, theta_of
from distcomp.pruning.masks import unwrapped
from distcomp.randomness import Key

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWNER = "structured"
Start = Literal["nearest", "variance"]
Patterns = str | Sequence[str] | None
"""Names of layers, with ``*`` as in a shell; None for all linear layers and convolutions."""


class Structure(Parametrization):
    """``weight = decode(theta)`` of fewer numbers. A subclass may compute with theta directly."""

    owner = OWNER
    order = Order.STRUCTURE

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        """What ``layer`` gives for ``x``, without the weight being made; None where making it pays."""
        return None

    def multiplications(self, layer: nn.Module, positions: int) -> int | None:
        """Of one example, at so many output positions, by :meth:`compute`; None where the weight is made."""
        return None

    def fresh(self, *theta: Tensor) -> Tensors:
        """Theta for a weight that was drawn at random: the nearest description of it, made larger until the
        weight has about the variance that it had. As it is, unless a subclass says otherwise."""
        return theta


class Seeded(Structure):
    """A structure with something drawn in it. The seed is in the state dict, and stands for what is drawn."""

    seed: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))

    @abstractmethod
    def draw(self) -> None:
        """Draw anew, from the seed."""

    def key(self, *what: int | str) -> Key:
        """Of what is drawn."""
        return Key.of("structured", int(self.seed), *what)

    def storage(self, below: Storage, weight: Tensors) -> Storage:
        """Theta, and the 64 bits of the seed."""
        return Storage(below.numbers, below.width, below.extra + 64)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        before = int(self.seed)
        super()._load_from_state_dict(*arguments, **options)
        if int(self.seed) != before:
            self.draw()


def wide(tensor: Tensor) -> Tensor:
    """float32 of a narrower float: neither an FFT nor a singular value decomposition knows those on a CPU."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def chosen_layers(model: nn.Module, patterns: Patterns) -> list[tuple[str, nn.Module]]:
    """The linear layers and convolutions that ``patterns`` names. Raises DistcompError for one that names
    none."""
    every = [(name, part) for name, part in unwrapped(model).named_modules() if isinstance(part, LAYERS)]
    if patterns is None:
        wanted = ["*"]
    else:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name, _ in every):
            known = ", ".join(repr(name) for name, _ in every) or "none"
            raise DistcompError(
                f"layers={pattern!r} names no linear layer or convolution; there are: {known}"
            )
    return [(name, part) for name, part in every if any(fnmatchcase(name, pattern) for pattern in wanted)]


def weight_name(layer: str) -> str:
    """``"fc"`` -> ``"fc.weight"``."""
    return f"{layer}.weight" if layer else "weight"


Make = Callable[[nn.Module, Tensor], Structure | None]
"""From a layer and its weight its structure; None leaves the layer as it is."""


@torch.no_grad()
def install_structures(
    model: nn.Module, patterns: Patterns, make: Make, start: Start = "nearest"
) -> nn.Module:
    """Give every chosen layer its structure, in place. Nothing is changed if one cannot be made."""
    if start not in ("nearest", "variance"):
        raise DistcompError(
            f"a structure starts 'nearest' to the weight or with its 'variance', not {start!r}"
        )
    layers = chosen_layers(model, patterns)
    for name, layer in layers:
        if any(link.order == Order.STRUCTURE for link in _links(layer)):
            raise DistcompError(
                f"{weight_name(name)} has a structure already; remove it first: "
                f"distcomp.parametrize.remove(model, {weight_name(name)!r}, 'structured', densify=True)"
            )
    made = [(name, layer, make(layer, layer.weight.detach())) for name, layer in layers]  # type: ignore[operator]
    for name, layer, structure in made:
        if structure is None:
            continue
        install(model, weight_name(name), structure)
        compute_with_theta(layer)
        if start == "variance":
            theta = parameters(model, weight_name(name))
            for parameter, value in zip(theta, structure.fresh(*theta), strict=True):
                parameter.copy_(value)
    return model


def _links(layer: nn.Module) -> list[Parametrization]:
    return [link for link in chain(layer, "weight") if isinstance(link, Parametrization)]


def compute_with_theta(layer: nn.Module) -> None:
    """Let a layer whose weight is a structure, and nothing else, compute with theta where that pays.

    Its class is its own (the parametrization gave it one); it gets a forward of its own, and loses it
    together with its last parametrization.
    """
    type(layer).forward = _forward


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    links = registered(self, "weight")
    if links is not None and len(links) == 1:
        structure: Any = links[0]
        if isinstance(structure, Structure):
            computed = structure.compute(self, x, *theta_of(links))
            if computed is not None:
                return computed
    for kind in type(self).__mro__:
        plain: Any = vars(kind).get("forward")
        if plain is not None and plain is not _forward:
            result: Tensor = plain(self, x)
            return result
    raise AssertionError("every layer has a forward")


CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


def convolved(
    x: Tensor, kernel: Tensor, layer: Any = None, groups: int = 1, bias: Tensor | None = None
) -> Tensor:
    """``x`` convolved with ``[out, in / groups, *taps]``: as ``layer`` strides and pads, or (None)
    plainly."""
    convolve: Any = CONVOLUTIONS[kernel.dim() - 2]
    geometry = (1, 0, 1) if layer is None else (layer.stride, layer.padding, layer.dilation)
    result: Tensor = convolve(x, kernel, bias, *geometry, groups)
    return result


def plain_geometry(layer: Any) -> bool:
    """Whether a layer pads with zeros and has one group, so that its convolution may be taken apart."""
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and layer.groups == 1)
