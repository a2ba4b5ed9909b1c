"""What is asked before C is given an address: that a tensor is what it is taken for.

C cannot see types, only addresses and sizes. It checks that what a table names lies within the sizes; here
it is checked that the sizes are those of such a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.errors import DistcompError

LINE_ITEM_BYTES = 8


def check_tensor(what: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
    """Raise DistcompError unless ``tensor`` is contiguous, of this type and ``numel`` elements or more."""
    if not tensor.is_contiguous() or tensor.dtype != dtype or tensor.numel() < numel:
        raise DistcompError(
            f"the {what} have {tensor.numel()} elements of {tensor.dtype} where {numel} of {dtype} are "
            "needed; pass a contiguous tensor of that size"
        )


def lines_of(table: Tensor, line_bytes: int) -> tuple[int, int]:
    """The address of a table on the CPU (int64 ``[lines, line_bytes / 8]``), and how many lines it has."""
    wanted = torch.Size([len(table), line_bytes // LINE_ITEM_BYTES]) if table.dim() else None
    if table.shape != wanted or table.device.type != "cpu":
        raise DistcompError(
            f"a table is {tuple(table.shape)} on {table.device}; pass one of {line_bytes // LINE_ITEM_BYTES} "
            "columns on the CPU"
        )
    check_tensor("lines of a table", table, torch.int64, 0)
    return table.data_ptr(), len(table)
