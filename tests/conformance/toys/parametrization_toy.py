"""A parametrization in one file, as a newcomer would add it: a matrix with one number for each diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.parametrize import Parametrization


class Toeplitz(Parametrization):
    """``weight[i, j] = theta[i - j + columns - 1]``: theta is ``[rows + columns - 1]``."""

    owner = "structured"
    diagonal: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        number = torch.arange(rows)[:, None] - torch.arange(columns) + columns - 1
        self.register_buffer("diagonal", number, persistent=False)

    def decode(self, theta: Tensor) -> Tensor:
        return theta[self.diagonal]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The mean of each diagonal: the nearest in the sense of least squares."""
        elements = torch.bincount(self.diagonal.flatten())
        return (
            weight.new_zeros(len(elements)).index_add(0, self.diagonal.flatten(), weight.flatten()) / elements
        )
