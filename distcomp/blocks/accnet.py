"""AccNet: a high-dimensional filter, imitated by splatting, stacked separable layers, and slicing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError


class CPLayer(nn.Module):
    """A convolution in d dimensions as a sum of separable ones: mix, one kernel along each dimension, mix.

    ``K = sum_r a_r (x) b_r (x) k1_r (x) ... (x) kd_r``: ``r (inputs + outputs + d k)`` numbers for
    ``inputs outputs k^d``.
    """

    def __init__(self, inputs: int, outputs: int, components: int, kernel: int, dims: int = 3) -> None:
        super().__init__()
        if dims not in (1, 2, 3) or kernel % 2 == 0:
            raise DistcompError(
                f"a CP layer has 1 to 3 dimensions and an odd kernel, not {dims} and {kernel}"
            )
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        along = [tuple(kernel if d == dim else 1 for d in range(dims)) for dim in range(dims)]

        def one_way(size: tuple[int, ...]) -> nn.Module:
            padding = tuple(side // 2 for side in size)
            made: nn.Module = convolution(
                components, components, size, padding=padding, groups=components, bias=False
            )
            return made

        self.mix_in = convolution(inputs, components, 1, bias=False)
        self.along = nn.Sequential(*(one_way(size) for size in along))
        self.mix_out = convolution(components, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix_out(self.along(self.mix_in(x)))
        return y


class AccNet(nn.Module):
    """Filter a signal by its values as well as its places: splat onto a grid, blur there, slice.

    ::

        splat    grid[i, j, z] += (f, 1) weights of the pixel at (i, j) with value f to the cells z around it
        blur     stacked CP layers with a ReLU between:  h = h + CP(relu(CP(h))) ...
        slice    the grid at each pixel, interpolated; the filtered value is (first channel) / (second)

    ``x``: ``[n, 1, h, w]`` with values in [0, 1]; returns the same shape. The linear part alone
    (``activation=False``) imitates what separable kernels on the grid can, such as Gaussian bilateral
    filters.

    Source: AccNet learns splat, blur and slice as CP layers with activations between, from examples of the
    target filter. We differ: splat and slice are linear interpolation in the value, and are not learned.
    """

    def __init__(
        self, cells: int = 8, components: int = 4, kernel: int = 5, depth: int = 2, *, activation: bool = True
    ) -> None:
        super().__init__()
        self.cells, self.activation = cells, activation
        self.layers = nn.ModuleList(CPLayer(2, 2, components, kernel) for _ in range(depth))

    def splat(self, x: Tensor) -> Tensor:
        """``[n, 2, h, w, cells]``: each pixel's value and weight in the two cells around its value."""
        weights = self._weights(x)
        return torch.stack([weights * x[:, 0, :, :, None], weights], 1)

    def _weights(self, x: Tensor) -> Tensor:
        """``[n, h, w, cells]``: linear interpolation."""
        place = x[:, 0, :, :, None].clamp(0, 1) * (self.cells - 1)
        return (1 - (place - torch.arange(self.cells, device=x.device)).abs()).clamp(min=0)

    def blur(self, grid: Tensor) -> Tensor:
        """The stacked layers, each around a shortcut."""
        for position, layer in enumerate(self.layers):
            bent = torch.relu(grid) if self.activation and position else grid
            grid = grid + layer(bent)
        return grid

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 1:
            raise DistcompError(f"AccNet filters images [n, 1, h, w], not {list(x.shape)}")
        sliced = (self.blur(self.splat(x)) * self._weights(x)[:, None]).sum(-1)
        denominator = sliced[:, 1:]
        safe = torch.where(denominator.abs() < 1e-3, torch.full_like(denominator, 1e-3), denominator)
        return sliced[:, :1] / safe


def bilateral(x: Tensor, spatial: float = 1.5, value: float = 0.15, reach: int = 3) -> Tensor:
    """The Gaussian bilateral filter, pixel by pixel: what an :class:`AccNet` may be asked to imitate.

    ``y_p = sum_q g(|p - q| / spatial) g(|x_p - x_q| / value) x_q`` over its weights, ``q`` within ``reach``.
    """
    padded = nn.functional.pad(x, (reach,) * 4, mode="reflect")
    total, weights = torch.zeros_like(x), torch.zeros_like(x)
    height, width = x.shape[2:]
    for di in range(2 * reach + 1):
        for dj in range(2 * reach + 1):
            other = padded[:, :, di : di + height, dj : dj + width]
            distance = ((di - reach) ** 2 + (dj - reach) ** 2) / spatial**2
            weight = torch.exp(-0.5 * (distance + ((x - other) / value).square()))
            total, weights = total + weight * other, weights + weight
    return total / weights


def imitate(
    net: nn.Module,
    target: Callable[[Tensor], Tensor],
    draw: Callable[[], Tensor],
    steps: int,
    rate: float = 1e-2,
) -> list[float]:
    """Train a network to give what a filter gives, on inputs that ``draw`` makes: mean squared errors, by
    step."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors = []
    for _ in range(steps):
        x = draw()
        loss = (net(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(loss.item())
    return errors
