"""What a method keeps in memory between steps, counted from the state that it declares."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from distcomp.averaging.base import Averaging, MultiLevel, fragment_states
from distcomp.averaging.codistill import PREDICTIONS, Codistillation
from distcomp.builtin_hooks import is_builtin, parse_builtin
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.methods.base import held_bytes

EXAMPLE = Layout.of([("matrix", (1000, 1000))])
"""Of what a figure per parameter is said."""
EXAMPLE_RANKS = 4
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def state_bytes(method: Method | Averaging | MultiLevel | str, layout: Layout, ranks: int) -> int:
    """Bytes that a rank of ``ranks`` keeps between steps for the parameters of ``layout``.

    Residuals, momenta, anchors, replicas of neighbours, warm starts. What an exchange works in while it lasts
    is not counted.

    Raises DistcompError for a text that names no method.
    """
    if isinstance(method, str) and is_builtin(method):
        return _hook_bytes(method, layout)
    chosen = parse(method) if isinstance(method, str) else method
    if isinstance(chosen, Method):
        return held_bytes(chosen.init(layout))
    if isinstance(chosen, Codistillation) and chosen.exchanged == PREDICTIONS:
        return 0  # of examples, not of parameters
    model = torch.zeros(layout.numel, dtype=torch.float32)
    total = 0
    for fragment in fragment_states(chosen, layout, 0, ranks):
        fragment.start(model[: fragment.layout.numel])
        total += held_bytes(fragment.state)
    return total


def bytes_per_parameter(method: Method | Averaging | MultiLevel | str) -> float:
    """:func:`state_bytes` of one number of a matrix of 1000 x 1000 among 4 ranks."""
    return state_bytes(method, EXAMPLE, EXAMPLE_RANKS) / EXAMPLE.numel


def _hook_bytes(text: str, layout: Layout) -> int:
    builtin, rank = parse_builtin(text)
    if builtin.name != "torch:powersgd":
        return 0
    sides = [(one.shape[0], one.numel // one.shape[0]) for one in layout.slices if len(one.shape) > 1]
    factors = sum((rows + columns) * min(rows, columns, rank or 1) for rows, columns in sides)
    return 4 * (layout.numel + factors)


@dataclass(frozen=True)
class NotFitting:
    """A method that does not fit: what a step takes without it, and what it keeps besides."""

    method: str
    step_bytes: int
    state_bytes: int
    memory_bytes: int

    @property
    def sentence(self) -> str:
        """Name and numbers."""
        needed = format_size(self.step_bytes + self.state_bytes)
        return (
            f"{self.method} does not fit: {format_size(self.step_bytes)} for a step as it is and "
            f"{format_size(self.state_bytes)} for what the method keeps are {needed}, and there are "
            f"{format_size(self.memory_bytes)}"
        )


def parse_size(text: str) -> int:
    """Bytes of ``"16GB"`` or ``"16 GiB"``. Raises DistcompError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    factors = {unit.lower(): factor for unit, factor in (UNITS | BINARY_UNITS).items()}
    if found is None or found[2].lower() not in factors or not float(found[1]):
        raise DistcompError(f'the memory {text!r} is no size; write it like "16GB" or "16GiB"')
    return int(float(found[1]) * factors[found[2].lower()])


def format_size(nbytes: float) -> str:
    """In decimal units, three digits."""
    unit = next((unit for unit in reversed(UNITS) if nbytes >= UNITS[unit]), "B")
    return f"{nbytes / UNITS[unit]:.3g} {unit}"
