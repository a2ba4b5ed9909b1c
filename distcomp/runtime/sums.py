"""The sum that has the same bits on every rank and over every transport."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def in_rank_order(terms: Sequence[Tensor]) -> Tensor:
    """``((x_0 + x_1) + x_2) + ...``, in a tensor of its own."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total
