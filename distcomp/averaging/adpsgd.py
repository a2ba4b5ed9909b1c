"""AD-PSGD: pairs average while both go on computing, and the step follows from the model before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.gossip import weighted
from distcomp.averaging.pairs import Pairs
from distcomp.collectives import Rounds
from distcomp.compressors import Compressor
from distcomp.errors import DistcompError
from distcomp.methods import Method, compressor_of, register
from distcomp.methods.base import AggregateResult, State
from distcomp.schedule import Schedule, extremes, varying


@dataclass(frozen=True)
class ADPSGD(Pairs):
    """Average with a random partner in the background; what was learnt meanwhile stays on top.

    ::

        sent after step t:             c_i = C(x_i)
        used after step t + staleness: x_i = x_i + (c_j - c_i) / 2

    With ``staleness=1`` and ``period=1`` that is the paper's ``x_{t+1} = (x_t^i + x_t^j) / 2 - step(x_t^i)``:
    the gradient is of the model before it was averaged. What one of a pair gains the other gives, so the sum
    of all models moves by the local updates alone. A worker waits for its partner alone, and only where that
    is more than ``staleness`` steps behind. A ``compressor`` other than the identity is a control: what it
    errs by does not fade.

    Source: Lian et al., "Asynchronous decentralized parallel stochastic gradient descent", ICML 2018. We
    differ: pairs are drawn ahead, alike on all ranks, where the paper's fast workers step more often and
    find a partner when they are ready; so nobody need be passive and no graph bipartite. Bytes: one payload.
    Memory: none but what is under way.

    Raises DistcompError for a staleness below 1 or above the period, and for ``on_failure="continue"``.
    """

    staleness: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.staleness <= extremes(self.period)[0]:
            raise DistcompError(
                f"the staleness is at least 1 and at most the period, {self.period}, not {self.staleness}: "
                "one exchange is under way at a time"
            )
        if self.on_failure != "stop":
            raise DistcompError(
                "ad_psgd stops when a partner dies while an exchange is under way; on_failure='continue' is "
                "for noloco, dpsgd and their like"
            )

    @property
    def overlap(self) -> int:
        return self.staleness

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {}

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        sent = self.encode(x, context)
        row, messages = yield from self.send(sent, context)
        mine = self.compressor.decode(sent, context.layout)
        theirs = {j: self.compressor.decode(payload, context.layout) for j, payload in messages.items()}
        return agreed(weighted(row, mine, theirs) - mine, state)

    def merge(self, now: Callable[[], Tensor], estimate: Tensor) -> Tensor:
        """The model as it is by now, and half of what the partner had more."""
        return now() + estimate


@register(
    paper="Lian et al., Asynchronous decentralized parallel stochastic gradient descent, ICML 2018",
    wire="4d / period, or the compressor's",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="pairs are drawn ahead, alike on all ranks, in place of whoever is ready: a worker waits "
    "for a partner that is more than staleness steps behind",
    limitations="where workers' speeds differ for long: all make as many steps; long staleness at large "
    "learning rates",
)
def ad_psgd(
    staleness: int = 1,
    compressor: Compressor | Method | str = "identity",
    period: int | Schedule | str = 1,
) -> Averaging:
    """Average models with a random partner while training goes on.

    An exchange begins every ``period`` steps and is used ``staleness`` steps later, on top of what was learnt
    meanwhile. With a ``compressor`` it is a control.
    """
    return ADPSGD(compressor_of(compressor), staleness=staleness, period=varying(period))
