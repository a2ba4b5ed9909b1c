"""MuLoCo: DiLoCo around Muon, whose progress bears few bits with error feedback."""

from __future__ import annotations

from distcomp.averaging.base import Averaging
from distcomp.averaging.outer import Outer
from distcomp.averaging.periodic import Periodic
from distcomp.compressors import Quantize
from distcomp.methods import ErrorFeedback, from_compressor, register
from distcomp.methods.basic import PLAIN
from distcomp.schedule import Schedule, varying


@register(
    paper="Thérien, Huang, Rish & Belilovsky, MuLoCo: Muon is a practical inner optimizer for DiLoCo, 2025",
    wire="(n-1)/n (d (bits + bits2)/8 + 8 d/block) / period, bits2 >= bits those of the mean",
    summable=False,
    biased=True,
    kind="periodic",
    deviations="the inner optimizer is whichever you give; levels are multiples of a block's largest value; "
    "a mean that is rounded again takes more bits, and its owner keeps that error; outer rates as DiLoCo's; "
    "biases and norms in float32",
    limitations="in short runs: what is owed at the end never arrives; with an inner optimizer whose steps "
    "are of very unequal sizes, most of them round to nothing at 2 bits",
)
def muloco(
    period: int | Schedule | str = 30,
    bits: int = 2,
    block: int = 512,
    decay: float = 1.0,
    pattern: str = "auto",
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    buffers: str = "average",
    on_failure: str = "stop",
) -> Averaging:
    """DiLoCo every ``period`` steps, to be used with Muon inside, whose outer gradient is sent in few bits.

    Rounded to the nearest level, ``bits`` per value in blocks of ``block``, with error feedback: ``e = decay
    e + Delta - sent``. ``pattern`` forces ``all_gather`` or ``reduce_scatter``. ``outer_lr``
    and ``outer_momentum`` (Nesterov's) are the outer optimizer's. The inner one is yours: for matrices
    ``torch.optim.Muon``, and another for the rest. ``buffers``: ``average`` or
    ``keep`` them at an exchange. ``on_failure`` as for ``diloco``.
    """
    few = Quantize(bits, block, rounding="nearest", plain=PLAIN.roles)
    return Periodic(
        ErrorFeedback(from_compressor(few, pattern), decay),
        Outer(outer_lr, outer_momentum, nesterov=True),
        period=varying(period),
        buffers=buffers,
        on_failure=on_failure,
    )
