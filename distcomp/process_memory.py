"""How much memory has this process held?"""

from __future__ import annotations

import resource
import sys

import torch


def peak_bytes() -> int:
    """The most that this process has held so far: of a GPU's memory where it used one, else of the machine's,
    Python and torch included."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
