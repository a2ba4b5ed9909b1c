"""Spatially adaptive computation time: each position of an image runs as many residual units as it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError


@dataclass(frozen=True)
class Ponder:
    """How long the positions of the last forward computed."""

    units: Tensor
    """Units that each position ran: ``[N, H, W]``."""
    remainder: Tensor
    """R, what was left of 1 for the unit at which it halted: ``[N, H, W]``, with its graph."""

    @property
    def cost(self) -> Tensor:
        """The mean of ``units + R``; only R has a gradient, which makes positions halt sooner."""
        return (self.units + self.remainder).mean()


class HaltingUnit(nn.Module):
    """``x + V relu(U * x)``, U a 3 x 3 convolution and V a 1 x 1 one; and a halting score ``sigmoid(w * x +
    b)``."""

    def __init__(self, channels: int, bias: float) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.score = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.constant_(self.score.bias, bias)  # type: ignore[arg-type]

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.mix(torch.relu(self.wide(x)))
        return out

    def branch_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """As :meth:`branch`, at the flat positions alone: ``[len(positions), channels]``."""
        _, channels, height, width = x.shape
        image, row, column = _unravel(positions, height, width)
        padded = nn.functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        shifts = torch.arange(3, device=x.device)
        patches = padded[
            image[:, None, None], (row[:, None] + shifts)[:, :, None], (column[:, None] + shifts)[:, None, :]
        ]  # [positions, 3, 3, channels]
        weight = self.wide.weight.permute(2, 3, 1, 0).reshape(9 * channels, channels)
        wide_bias, mix_bias = self.wide.bias, self.mix.bias
        assert wide_bias is not None
        assert mix_bias is not None
        hidden = torch.relu(torch.addmm(wide_bias, patches.reshape(len(positions), -1), weight))
        return torch.addmm(mix_bias, hidden, self.mix.weight.view(channels, channels).t())


class SpatialHalting(nn.Module):
    """A stage of L residual units through which each position goes until it halts.

    ::

        h_l = sigmoid(w_l * x_l + b_l), h_L = 1;   position halts at the first l with sum_{j<=l} h_j >= 1 -
        eps y   = sum_l p_l x_l,   p_l = h_l before it halts, R = 1 - sum_{j<l} h_j where it does
        cost = mean of (units run + R), to be added to the loss times tau

    Positions that have halted keep their x. In evaluation the units are computed at active positions alone,
    gathered as rows of 3 x 3 patches; training computes all and masks. Per position, so nothing about the
    wire.

    Args:
        channels, units: of the stage.
        bias: of the halting scores at the beginning; below zero, so that computation starts deep.
        epsilon: how near to 1 is enough.

    Source: Figurnov et al., "Spatially Adaptive Computation Time for Residual Networks", CVPR 2017. We
    differ: a unit is one 3 x 3 and one 1 x 1 convolution, without a pooled term in the score.

    Raises DistcompError for fewer than one unit, or an epsilon outside [0, 1).
    """

    def __init__(self, channels: int, units: int, bias: float = -2.0, epsilon: float = 0.01) -> None:
        super().__init__()
        if units < 1 or not 0 <= epsilon < 1:
            raise DistcompError(
                f"{units} units and an epsilon of {epsilon} make no stage; use 1 or more, and 0.01"
            )
        self.units = nn.ModuleList(HaltingUnit(channels, bias) for _ in range(units))
        self.epsilon = epsilon
        self.gathered = True
        """Whether evaluation gathers active positions; otherwise it masks, as training does."""
        self.ponder = Ponder(torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[N, channels, H, W]``, and so is the answer."""
        shape = (x.shape[0], 1, *x.shape[2:])
        total, run = x.new_zeros(shape), x.new_zeros(shape)
        remainder, y = x.new_ones(shape), torch.zeros_like(x)
        active = x.new_ones(shape)
        for number, unit in enumerate(self.units):
            assert isinstance(unit, HaltingUnit)
            if not self.training and not bool(active.any()):
                break
            x = x + self._branch(unit, x, active)
            run = run + active
            last = number + 1 == len(self.units)
            score = torch.ones_like(total) if last else torch.sigmoid(unit.score(x))
            halts = active * ((total + score) >= 1 - self.epsilon).to(x.dtype)
            stays = active - halts
            weight = stays * score + halts * (1 - total)
            remainder = torch.where(halts.bool(), 1 - total, remainder)
            y = y + weight * x
            total = total + stays * score
            active = stays
        self.ponder = Ponder(run.squeeze(1), remainder.squeeze(1))
        return y

    def _branch(self, unit: HaltingUnit, x: Tensor, active: Tensor) -> Tensor:
        if self.training or not self.gathered:
            return active * unit.branch(x)
        positions = active.reshape(-1).nonzero().squeeze(1)
        branch = torch.zeros_like(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        branch = branch.index_copy(0, positions, unit.branch_at(x, positions).to(branch.dtype))
        return branch.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)

    def products(self, channels: int) -> float:
        """Multiplications of a position in the last forward, on average, halting scores included."""
        unit = 9 * channels * channels + channels * channels
        return float(self.ponder.units.float().mean()) * unit + (len(self.units) - 1) * 9 * channels


def _unravel(positions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    inside = positions % (height * width)
    return positions // (height * width), inside // width, inside % width
