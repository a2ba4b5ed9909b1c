"""Binary layers at inference: packed words, xor and population count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.kernels.binary import binary_conv2d, binary_linear, pack_filters
from distcomp.parametrize import chain
from distcomp.precision.binary import BinaryWeight, ScaledBinary, Sign, SignAndScale
from distcomp.precision.convert import converted, remove


def pack(model: nn.Module) -> nn.Module:
    """Replace trained binary layers by packed ones, in place, for inference: 32 x smaller weights.

    Takes what :func:`distcomp.precision.bnn` and :func:`distcomp.precision.xnor_net` have converted; every
    other converted layer is baked (:func:`distcomp.precision.remove`). The numbers are the same up to the
    rounding of float32; ``state_dict()`` holds the words, so a checkpoint is packed, too.

    Raises DistcompError where no layer is binary in weights and inputs, or a binary convolution is grouped,
    dilated, not square in stride or padding, or padded otherwise than with zeros.
    """
    chosen = [(name, layer) for name, layer in converted(model) if _is_binary(layer)]
    if not chosen:
        raise DistcompError(
            "no layer has binary weights and inputs; convert with distcomp.precision.bnn or xnor_net"
        )
    packed = [(name, layer, _packed(name, layer)) for name, layer in chosen]
    for name, layer, packed_layer in packed:
        remove(layer, densify=True)
        if layer is model:
            return packed_layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed_layer)
    return remove(model).eval()


def _is_binary(layer: nn.Module) -> bool:
    input_quantizer = getattr(layer, "input_quantizer", None)
    return isinstance(input_quantizer, Sign | SignAndScale) and isinstance(layer, nn.Linear | nn.Conv2d)


def _packed(name: str, layer: nn.Module) -> nn.Module:
    scaled = isinstance(layer.input_quantizer, SignAndScale)
    if chain(layer, "weight")[-1].__class__ not in (BinaryWeight, ScaledBinary):
        raise DistcompError(
            f"the binary weight of {name} is pruned, and packed words hold no zeros; take the masks off first"
        )
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if isinstance(layer, nn.Conv2d):
        stride, padding = set(layer.stride), set(layer.padding)
        usual = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        if not (usual and len(stride) == len(padding) == 1 and not isinstance(layer.padding, str)):
            raise DistcompError(
                f"{name} is grouped, dilated or not square, which packed convolutions are not; "
                "name it in skip"
            )
        return BinaryConv2d(weight, bias, layer.stride[0], int(layer.padding[0]), scaled)
    return BinaryLinear(weight, bias, scaled)


class _Binary(nn.Module):
    words: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, input_scale: bool) -> None:
        super().__init__()
        filters = weight.detach() if weight.dim() == 4 else weight.detach()[:, :, None, None]
        outputs, channels, height, width = filters.shape
        self.shape = (outputs, channels, height, width)
        self.input_scale = input_scale
        self.register_buffer("words", pack_filters(filters))
        self.register_buffer("scale", filters.abs().flatten(1)[:, 0].clone())
        self.register_buffer(
            "bias", torch.zeros(len(filters), dtype=torch.float32) if bias is None else bias.detach().clone()
        )


class BinaryLinear(_Binary):
    """``sign(x) W^T + b`` of packed ``W = alpha * signs``, times the mean of |x| where ``input_scale``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]``; no gradient."""
        if not self.input_scale:
            return binary_linear(x.detach(), self.words, self.shape, self.scale, self.bias)
        y = binary_linear(x.detach(), self.words, self.shape, self.scale, torch.zeros_like(self.bias))
        return y * x.detach().abs().mean(-1, keepdim=True) + self.bias


class BinaryConv2d(_Binary):
    """``sign(x) * W + b`` of packed ``W = alpha * signs``, times K where ``input_scale`` (XNOR-Net)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, padding: int, input_scale: bool
    ) -> None:
        super().__init__(weight, bias, input_scale)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """``[samples, channels, height, width]``; no gradient."""
        x, how = x.detach(), (self.stride, self.padding)
        if not self.input_scale:
            return binary_conv2d(x, self.words, self.shape, self.scale, self.bias, *how)
        y = binary_conv2d(x, self.words, self.shape, self.scale, torch.zeros_like(self.bias), *how)
        box = x.new_full((1, 1, *self.shape[2:]), 1 / (self.shape[2] * self.shape[3]))
        k = nn.functional.conv2d(x.abs().mean(1, keepdim=True), box, None, *how)
        return y * k + self.bias.view(-1, 1, 1)
