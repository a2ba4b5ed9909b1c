"""DES-LOC: weights, and each moment of the optimizer, are averaged at periods of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distcomp.averaging.base import Averaging
from distcomp.averaging.periodic import Periodic
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import register
from distcomp.methods.base import all_reduce_bytes

FIRST, SECOND = ("exp_avg", "momentum_buffer"), ("exp_avg_sq",)
"""What optimizers of PyTorch call their first and second moments."""


@dataclass(frozen=True)
class DesLoc(Periodic):
    """Average weights, first and second moments every ``period``, ``first_period`` and ``second_period``
    steps::

        x_i = mean_i x_i    where  t mod period = 0
        u_i = mean_i u_i    where  t mod first_period = 0       exp_avg, or SGD's momentum_buffer
        v_i = mean_i v_i    where  t mod second_period = 0      exp_avg_sq

    A moment that forgets slowly differs little between workers and may wait longer. Equal periods are Local
    Adam, ``local_sgd(optimizer_state="average")``. Moments are averaged in float32, after the optimizer's
    step; those that an optimizer does not have are none, and what a rank has not begun to keep is not
    averaged that time.

    Source: Iacob et al., "DES-LOC", ICLR 2026, whose recommended periods are K, 3 K and 6 K. We differ: the
    mean is taken after step t in place of before step t + 1, which is the same. Bytes: ``2 (n-1)/n 4 d`` for
    each that is due. Memory: one model (the anchor).

    Raises DistcompError for periods below 1.
    """

    first_period: int = 3
    second_period: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_period < 1 or self.second_period < 1:
            raise DistcompError(
                f"a moment's period is at least 1 step, not {self.first_period} and {self.second_period}"
            )

    @property
    def moment_periods(self) -> Mapping[str, int]:
        return dict.fromkeys(FIRST, self.first_period) | dict.fromkeys(SECOND, self.second_period)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        """What Adam's moments add on top of the weights."""
        each, numbers = all_reduce_bytes(4 * layout.numel, size), super().conditions(layout, size)
        moments = each / self.first_period + each / self.second_period
        return {name: number + moments for name, number in numbers.items()}


@register(
    paper="Iacob et al., DES-LOC: desynced low communication adaptive optimizers for training foundation "
    "models, ICLR 2026",
    wire="2 (n-1)/n 4d (1/period + 1/first_period + 1/second_period), with two moments",
    summable=True,
    biased=False,
    kind="periodic",
    deviations="nowhere that is known: means after step t are those before step t + 1",
    limitations="short periods with Adam: the moments triple what is sent; the optimizer must be handed over",
)
def des_loc(
    period: int = 32, first_period: int = 0, second_period: int = 0, buffers: str = "average"
) -> Averaging:
    """Average the weights every ``period`` steps, and each moment of the optimizer at a period of its own.

    ``first_period``, ``second_period``: of the first moment (Adam's ``exp_avg``, SGD's ``momentum_buffer``)
    and the second (``exp_avg_sq``); 0 takes three and six times ``period``. ``buffers``: ``average`` or
    ``keep`` them at an exchange of weights.
    """
    return DesLoc(
        period=period,
        first_period=first_period or 3 * period,
        second_period=second_period or 6 * period,
        buffers=buffers,
    )
