"""A convolution in the frequency domain: the input's responses to the DCT bases once, then sparse mixes of
them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.pruning.frequency import dct_basis


def dct_kernels(like: Tensor) -> Tensor:
    """``[h w, h, w]``: the separable bases of kernels of a weight ``[out, in, h, w]``, each of length 1."""
    rows, columns = (dct_basis(size).to(like) for size in like.shape[2:])
    return torch.einsum("ai,bj->abij", rows, columns).flatten(0, 1)


def dct_coefficients(weight: Tensor) -> Tensor:
    """``[out, in, h w]`` of a weight; ``weight = sum_b F[..., b] dct_kernels(weight)[b]``."""
    return torch.einsum("oihw,bhw->oib", weight, dct_kernels(weight))


class DctConv2d(nn.Module):
    """What a convolution computes, from the coefficients of its kernels: CNNpack's path.

    ::

        r[c, b] = x[c] * basis_b                  h w convolutions of each input channel, whatever the outputs
        y[o]    = sum_{c, b} F[o, c, b] r[c, b]   over the coefficients that are not zero

    ``sparse``: whether the second product is one with a sparse matrix (CSR), which takes as many
    multiplications as there are coefficients, or a dense one.
    """

    def __init__(self, conv: nn.Conv2d, coefficients: Tensor, *, sparse: bool = True) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.kernels: Tensor
        self.register_buffer("kernels", dct_kernels(conv.weight)[:, None].detach())
        mix = coefficients.detach().flatten(1)
        self.mix = mix.to_sparse_csr() if sparse else mix
        self.bias = conv.bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``[n, in, h, w] -> [n, out, h', w']``; for inference."""
        n, c = x.shape[:2]
        convolve: Any = nn.functional.conv2d
        responses = convolve(
            x.flatten(0, 1)[:, None], self.kernels, None, self.stride, self.padding, self.dilation
        )
        space = responses.shape[2:]
        columns = responses.view(n, c * responses.shape[1], -1).transpose(0, 1).flatten(1)  # [c b, n places]
        y: Tensor = (self.mix @ columns).view(-1, n, *space).transpose(0, 1)
        return y if self.bias is None else torch.add(y, self.bias.view(-1, 1, 1))
