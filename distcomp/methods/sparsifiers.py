"""A few elements instead of all: each rank's largest, random ones, or those that are largest on one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from distcomp.collectives import Broadcast, Rounds
from distcomp.compressors import Cast, Compressor, Identity, RandomK, TopK
from distcomp.compressors.topk import with_values
from distcomp.errors import DistcompError
from distcomp.grammar import unbracketed
from distcomp.kernels import memory
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import except_small, with_feedback
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.integers import HomomorphicQuantizer
from distcomp.methods.registry import method_of, register
from distcomp.payload import Parts, Payload, body_bytes, wire_bytes
from distcomp.registry import METHODS

SUMMED = {
    "fp32": from_compressor(Identity()),
    "bf16": from_compressor(Cast("bf16")),
    "fp16": from_compressor(Cast("fp16")),
    "int8": HomomorphicQuantizer(8),
    "int4": HomomorphicQuantizer(4),
}
"""How values at places that all ranks share may be summed, by name."""

OWED = {**SUMMED, **{name: from_compressor(Cast(name), "reduce_scatter") for name in ("bf16", "fp16")}}
"""The same under error feedback. A ring rounds sums of a narrow type at every hop, and nobody would owe that:
owners of chunks add in float32 instead, for the same bytes, and owe what their answer is rounded by."""


@register(
    paper="Aji & Heafield, EMNLP 2017; Stich et al., Sparsified SGD with memory, NeurIPS 2018",
    wire="(n-1) k (4 + (2 + log2(d/k))/8), k = ratio d; narrower values: 2, 1, 1/2, ... for the 4",
    summable=False,
    biased=True,
    deviations="indices packed to within half a bit of the least possible; biases and norms in float32",
    limitations="what is gathered grows with the number of ranks; at small ratios and large learning "
    "rates old residuals arrive in bursts",
)
def topk(
    ratio: float = 0.01,
    values: str | Compressor = "fp32",
    chunk: int = 0,
    pattern: str = "all_gather",
    error_feedback: bool = True,
) -> Method:
    """Send each parameter's k largest magnitudes, and owe the rest.

    See :class:`distcomp.compressors.TopK`. ``values``: ``fp32``, ``bf16``, ``fp16``, ``int8``, ``int4``,
    ``int2``, ``sign``, or any compressor. ``chunk`` takes the largest of every so many elements instead of
    every parameter, which is faster; ``pattern="reduce_scatter"`` selects again, from the sum, at the owner
    of each chunk, so that traffic does not grow with n. Without ``error_feedback`` what is left out is
    forgotten.
    """
    return except_small(with_feedback(with_values(TopK(ratio, chunk), values), pattern, error_feedback))


@dataclass(frozen=True)
class SharedRandomK(Method):
    """Every rank sends the same k random elements of each parameter: an all-reduce of k values, no indices.

    ::

        S: k places drawn without replacement from a key that all ranks share
        estimate_j = f/n sum_i (x_i)_j  for j in S, else 0;      f = d/k (unbiased) or 1 (scaled=False)

    Unbiased with ``omega = d/k - 1``; unscaled it contracts by ``k/d`` in the mean, for error feedback. On
    the wire: that of ``inner`` for k values; ``2 (n-1)/n 4k`` bytes in float32.

    Source: Stich et al., NeurIPS 2018; Konečný & Richtárik 2018. We differ: without replacement, by a
    counter-based key that leaves the global generator alone; ``inner`` may be any method, so that values may
    be narrow, too.

    Raises DistcompError for a ratio outside (0, 1].
    """

    select: RandomK
    inner: Method

    def init(self, layout: Layout) -> State:
        return self.inner.init(self.select.kept(layout))

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        # The key that all ranks share: the same places everywhere, so that no index is sent.
        where = self.select.drawn(context.layout, context.shared).to(x.device)
        factors = self.select.factors(context.layout, x.device)
        kept = self.select.kept(context.layout)
        result = yield from self.inner.aggregate(x[where] * factors, state, replace(context, layout=kept))
        return _placed(result, where, x)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(self.select.kept(layout), size, step)


@dataclass(frozen=True)
class CyclicTopK(Method):
    """Rank ``t mod n`` chooses: where its k largest elements are, all ranks send, by an all-reduce.

    ::

        S_t = the k largest magnitudes of x_{t mod n}, broadcast
        estimate_j = 1/n sum_i (x_i)_j  for j in S_t, else 0

    Because all ranks send the same places, traffic does not grow with n as top-k's does. Contracts for the
    leader by ``k/d``, for the others as far as ranks agree on what is large. On the wire: ``inner``'s bytes
    for k values, and ``(n-1)/n`` times about ``k (2 + log2(d/k))/8`` bytes of indices, from the leader to
    all.

    Source: Chen et al., "ScaleCom: scalable sparsified gradient compression", NeurIPS 2020.

    Raises DistcompError for a ratio outside (0, 1] or a negative chunk.
    """

    select: TopK
    inner: Method

    def init(self, layout: Layout) -> State:
        return self.inner.init(self.select.kept(layout))

    def _parts(self, layout: Layout) -> Parts:
        return (self.select.index_part(layout),)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        # By turns: no rank's data decides alone what is sent, and nobody is asked who is next.
        leader = context.step % context.size
        choice = Payload.empty(self._parts(context.layout), x.device)
        if context.rank == leader:
            _, codes = self.select.select(x, context.layout)
            choice["indices"].copy_(codes)
        choice = yield Broadcast(choice, source=leader)

        where = self.select.positions(choice, context.layout)
        kept = self.select.kept(context.layout)
        result = yield from self.inner.aggregate(x[where], state, replace(context, layout=kept))
        return _placed(result, where, x)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        parts = self._parts(layout)
        tree = (size - 1) / size
        # Header and indices are rounded one by one, as the ledger counts them.
        sent = round((wire_bytes(parts) - body_bytes(parts)) * tree) + round(body_bytes(parts) * tree)
        return sent + self.inner.payload_bytes(self.select.kept(layout), size, step)


def _placed(result: AggregateResult, where: Tensor, like: Tensor) -> AggregateResult:
    """What was agreed about a few values, put where they belong among zeros."""

    def spread_out(values: Tensor) -> Tensor:
        out = memory.empty(like.numel(), like.device)
        out.zero_().index_copy_(0, where, values)
        return out

    return AggregateResult(
        spread_out(result.estimate), lambda: spread_out(result.contribution()), result.state
    )


def _summed(values: str | Method, residual: bool) -> Method:
    if isinstance(values, str) and values in SUMMED:
        return OWED[values] if residual else SUMMED[values]
    name = unbracketed(values).partition(":")[0].strip() if isinstance(values, str) else ""
    if isinstance(values, str) and name not in METHODS:
        raise DistcompError(
            f"values cannot be summed as {values!r}; use one of {', '.join(SUMMED)}, or a method"
        )
    return method_of(values)


@register(
    paper="Stich et al., Sparsified SGD with memory, NeurIPS 2018",
    wire="2 (n-1)/n 4k, k = ratio d",
    summable=True,
    biased=True,
    deviations="without replacement, from a key that all ranks share; under error feedback bf16 and fp16 "
    "values are added in float32 by owners of chunks; biases and norms in float32",
    limitations="at small ratios most of a gradient is d/k steps old when it is sent",
)
def random_k(ratio: float = 0.01, values: str | Method = "fp32", error_feedback: bool = True) -> Method:
    """Send the same k random elements of each parameter on every rank: an all-reduce, without indices.

    With ``error_feedback`` values are sent as they are and the rest is owed; without it they are multiplied
    by d/k, so that the mean is right. ``values``: ``fp32``, ``bf16``, ``fp16``, or integers that add exactly,
    ``int8``, ``int4``. See :class:`SharedRandomK`.
    """
    method = SharedRandomK(RandomK(ratio, scaled=not error_feedback), _summed(values, error_feedback))
    return except_small(ErrorFeedback(method) if error_feedback else method)


@register(
    paper="Chen et al., ScaleCom, NeurIPS 2020",
    wire="2 (n-1)/n 4k + (n-1)/n k (2 + log2(d/k))/8, k = ratio d",
    summable=True,
    biased=True,
    deviations="exact top-k, not the chunk-wise quasi-sort; beta=1 (plain error feedback) is the default; "
    "packed indices; bf16 and fp16 values are added in float32 by owners of chunks; biases and norms in "
    "float32",
    limitations="where ranks see different data, what is largest on one of them is not what is largest on "
    "the others",
)
def cyclic_topk(
    ratio: float = 0.01, values: str | Method = "fp32", chunk: int = 0, beta: float = 1.0
) -> Method:
    """Send, on every rank, the elements that are largest on rank t mod n, by an all-reduce, and owe the rest.

    ``beta < 1`` is the paper's low-pass filter (:class:`ErrorFeedback`). See :class:`CyclicTopK`.
    """
    method = CyclicTopK(TopK(ratio, chunk), _summed(values, residual=True))
    return except_small(ErrorFeedback(method, beta=beta))
