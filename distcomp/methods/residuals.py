"""Residuals in fewer bits than float32, rounded at random so that nothing is lost on average.

What error feedback keeps is as long as the flat buffer, which on a sharded model is the whole model. Rounded
to the nearest, what is small would be lost for ever; rounded at random, every number is right in expectation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.compressors.quantize import Quantize
from distcomp.errors import DistcompError
from distcomp.kernels.reference import uniform
from distcomp.layout import FlatBuffer, Layout
from distcomp.payload import Payload
from distcomp.randomness import Key

FORMS = ("float32", "bf16", "int8")
AT_ONCE = 1 << 20
"""Elements whose random numbers are made together: they take eight bytes each."""
EIGHT = Quantize(8)
"""Blocks of 512, each with the scale of its largest value, rounded at random."""


class PackedBuffer(FlatBuffer):
    """A flat buffer that is kept in ``form``: 2 bytes for each value in ``bf16``, 1 and 4 for every 512 in
    ``int8``. ``data`` is decoded whenever it is asked for (float32)."""

    packed: Tensor
    form: str

    def __init__(self, packed: Tensor, layout: Layout, form: str) -> None:
        for name, value in (("packed", packed), ("layout", layout), ("form", form)):
            object.__setattr__(self, name, value)  # frozen, as every leaf of a state

    @property
    def data(self) -> Tensor:
        if self.form == "bf16":
            return self.packed.float()
        return EIGHT.decode(Payload(self.packed, EIGHT.parts(self.layout)), self.layout)

    @property
    def held_bytes(self) -> int:
        return self.packed.numel() * self.packed.element_size()

    def where(self, finite: Tensor, old: FlatBuffer) -> FlatBuffer:
        """This one where ``finite``, else ``old``, without asking the host."""
        if isinstance(old, PackedBuffer) and old.form == self.form:
            return PackedBuffer(torch.where(finite, self.packed, old.packed), self.layout, self.form)
        return FlatBuffer(torch.where(finite, self.data, old.data), self.layout)


def kept(residual: Tensor, layout: Layout, form: str, key: Key) -> FlatBuffer:
    """The residual (float32, ``[layout.numel]``) in ``form``.

    ``E[kept] = residual``, element by element. ``bf16``: one of the two neighbours of a number, less than
    ``2^-7 |e_j|`` away; ``int8``: one of the two neighbours on its block's grid, less than ``max|block| /
    127`` away.
    """
    if form == "float32":
        return FlatBuffer(residual, layout)
    key = key.fold("residual")
    if form == "bf16":
        return PackedBuffer(to_bf16(residual, key), layout, form)
    return PackedBuffer(EIGHT.encode(residual, layout, key).wire, layout, form)


def to_bf16(x: Tensor, key: Key) -> Tensor:
    """One of the two bfloat16 around each float32, the nearer the likelier. NaN and infinity stay.

    The 16 bits that bfloat16 lacks are a number of 65536ths of the way to the neighbour farther from zero.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    for at in range(0, x.numel(), AT_ONCE):
        piece = x[at : at + AT_ONCE].contiguous()
        noise = (uniform(piece.numel(), key.bits, at, x.device) * 65536.0).to(torch.int32)
        rounded = ((piece.view(torch.int32) + noise) & -65536).view(torch.float32)
        out[at : at + AT_ONCE] = torch.where(torch.isfinite(piece), rounded, piece)
    return out


def check_form(form: str) -> None:
    """Raise DistcompError for a form that there is none of."""
    if form not in FORMS:
        raise DistcompError(f"a residual is kept in {', '.join(FORMS[:-1])} or {FORMS[-1]}, not {form!r}")
