"""my_compressor in plain NumPy: the equations of its source and nothing of its implementation.

Write it from the paper, by somebody who has not seen the other file if you can.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def decoded(x: NDArray[Any], kept: int) -> NDArray[Any]:
    """What comes back of ``x`` (float32)."""
    mask = np.uint32(0xFFFFFFFF << (8 * (4 - kept)) & 0xFFFFFFFF)
    return (x.astype(np.float32).view(np.uint32) & mask).view(np.float32)


def part_bytes(numel: int, kept: int) -> int:
    """What is sent of so many values, without the header."""
    return kept * numel
