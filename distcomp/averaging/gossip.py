"""Models, with neighbours only: D-PSGD, DCD-PSGD, CHOCO-SGD and DeepSqueeze.

Each worker knows its row of the mixing matrix ``W`` (see :mod:`distcomp.averaging.topology`) and sends one
payload to each neighbour: degree x payload bytes per exchange, however many workers there are. In every
exchange ``x`` is the model after the local update, whatever optimizer made it: ``x = x_t - step``. ``C`` is
the compressor; what it did is never computed again by the receiver, who applies the bytes that the owner
applied: replicas equal their owners' models bit for bit.

A neighbour that does not answer, or is known to be lost, is left out; its weight goes to the worker itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.topology import MixingRow, Topology, check_name, resolve
from distcomp.collectives import NeighborExchange, Rounds
from distcomp.compressors import Compressor, Identity
from distcomp.compressors.contraction import measured_contraction, relative_error
from distcomp.errors import DistcompError
from distcomp.kernels.mixing import mix, pull
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, State
from distcomp.payload import Payload

ORDERS = ("combine_then_adapt", "adapt_then_combine")
"""Whether neighbours mix before or after the local update."""

NeighbourPayloads = Mapping[int, Payload]
"""Neighbour -> what it sent."""


def check_step(step: float, name: str) -> None:
    """Raise DistcompError for a part of the way to the neighbours' mean that is none of it, or beyond it."""
    if not 0 < step <= 1:
        raise DistcompError(f"{name} is above 0 and at most 1, not {step:.3g}; leave it at its default")


@dataclass(frozen=True)
class Gossip(Averaging):
    """What all gossip has in common: a compressor, a topology, and one payload to each neighbour.

    Bytes: degree x payload. Models and replicas are float32 ``[layout.numel]``.
    """

    replicas: ClassVar[bool] = False
    """Whether a worker keeps replicas of its neighbours' models: they must then stay its neighbours."""

    replicated: ClassVar[str] = "public"
    """The part of the state that neighbours keep replicas of."""

    compressor: Compressor = field(default_factory=Identity)
    topology: str | Topology = "ring"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.topology, str):
            check_name(self.topology)

    @property
    def starts_anew(self) -> bool:
        return True

    def row(self, context: AveragingContext) -> MixingRow:
        """This worker's neighbours and weights, lost ones left out."""
        return resolve(self.topology, context.size).row(context.rank, context.step).without(context.absent)

    def send(
        self, payload: Payload, context: AveragingContext
    ) -> Rounds[tuple[MixingRow, NeighbourPayloads]]:
        """Exchange payloads with the neighbours: the row over those who answered, and what they sent."""
        row = self.row(context)
        answers: list[Payload | None] = yield NeighborExchange(payload, row.neighbours)
        messages = {
            j: answer for j, answer in zip(row.neighbours, answers, strict=True) if answer is not None
        }
        return row.without(set(row.neighbours) - set(messages)), messages

    def encode(self, x: Tensor, context: AveragingContext) -> Payload:
        """``C(x)``, with noise of the worker's own."""
        return self.compressor.encode(x, context.layout, context.private)

    def advance(self, base: Tensor, payload: Payload, layout: Layout, times: float = 1.0) -> Tensor:
        """``base + times C(z)``: the one place where owner and neighbours apply the same bytes."""
        return self.compressor.decode_onto(base, payload, layout, times)

    def public(self, state: State) -> FlatBuffer | None:
        """What the neighbours keep replicas of."""
        part: FlatBuffer | None = state[self.replicated] if self.replicas else None
        return part

    def with_replica(self, state: State, neighbour: int, model: Tensor, layout: Layout) -> State:
        """The state, with ``model`` as the replica of a neighbour who is back."""
        return {**state, "replicas": {**state["replicas"], str(neighbour): FlatBuffer(model, layout)}}

    def restart(self, x: Tensor, state: State, context: AveragingContext) -> State:
        """The state of a worker that goes on from another's model ``x``."""
        return self.init(x, context)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        topology = resolve(self.topology, size)
        if self.replicas and topology.changes:
            raise DistcompError(
                f"{type(self).__name__} keeps replicas of its neighbours' models; they must not change, "
                f"and those of {topology.name} do; use a fixed topology, or dpsgd or deepsqueeze"
            )
        numbers = {"topology": topology.name, "rho": topology.rho, "spectral_gap": topology.spectral_gap}
        return numbers if topology.changes else {**numbers, "mu": topology.mu}


@dataclass(frozen=True)
class DPSGD(Gossip):
    """Mix models with the neighbours' and add the local update.

    ::

        combine_then_adapt   x_{t+1}^i = sum_j W_ij x_t^j - step_i            (the paper's)
        adapt_then_combine   x_{t+1}^i = sum_j W_ij (x_t^j - step_j)

    With a compressor other than the identity it is *naive compressed gossip*, ``sum_j W_ij C(x^j)``, which
    does not converge below a floor: a control.

    Source: Lian et al., NeurIPS 2017. We differ: a period, and any compressor as a control. Bytes: degree x
    4 d. Memory: one model (none where the update comes first).

    Raises DistcompError for an unknown order.
    """

    order: str = "combine_then_adapt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise DistcompError(f"there is no order {self.order!r}; use one of {', '.join(ORDERS)}")

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {"model": FlatBuffer(x.clone(), context.layout)} if self.order == "combine_then_adapt" else {}

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        adapt_first = self.order == "adapt_then_combine"
        mine = x if adapt_first else state["model"].data
        row, messages = yield from self.send(self.encode(mine, context), context)
        theirs = {j: self.compressor.decode(payload, context.layout) for j, payload in messages.items()}
        model = weighted(row, mine, theirs)
        if adapt_first:
            return agreed(model, state)
        model += x - mine  # the local update, made at the model that was mixed
        return agreed(model, {"model": FlatBuffer(model, context.layout)})


@dataclass(frozen=True)
class DCD(Gossip):
    """Send the compressed difference of the new model and the old; all replicas move by the same.

    ::

        z^i       = sum_j W_ij x^_t^j - step_i - x_t^i
        x_{t+1}^i = x_t^i + C(z^i)                         own model and all replicas of it

    Converges where the compressor's relative error ``alpha`` is below ``(1-rho) / (2 mu)``; that is
    sufficient, not necessary. Needs a *relative* quantizer: as ``z`` shrinks, so must the error.

    Source: Tang et al., "Communication compression for decentralized training", NeurIPS 2018, DCD-PSGD.
    Bytes: degree x payload. Memory: one model per neighbour and one of its own.
    """

    replicas: ClassVar[bool] = True
    replicated: ClassVar[str] = "model"

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "model": FlatBuffer(x.clone(), context.layout),
            "replicas": copies(x, self.row(context), context.layout),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        before, replicas = state["model"].data, tensors(state["replicas"])
        # x - before is the local update, whatever optimizer made it: what the paper calls the step.
        z = weighted(self.row(context), before, replicas) + (x - before) - before
        sent = self.encode(z, context)
        _, messages = yield from self.send(sent, context)
        model = self.advance(before, sent, context.layout)
        for j, payload in messages.items():
            replicas[j] = self.advance(replicas[j], payload, context.layout)
        state = {"model": FlatBuffer(model, context.layout), "replicas": buffers(replicas, context.layout)}
        return agreed(model, state)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        numbers = super().conditions(layout, size)
        alpha = relative_error(self.compressor, layout)
        limit = (1 - numbers["rho"]) / (2 * numbers["mu"]) if numbers["mu"] else 1.0
        numbers |= {"alpha": alpha, "alpha_limit": limit}
        if alpha >= limit:
            numbers["warning"] = (
                "DCD is proven to converge where the compressor's relative error alpha is below "
                f"(1-rho)/(2 mu) = {limit:.3g} on {numbers['topology']}; on Gaussian data {self.compressor} "
                f"has {alpha:.3g}; use more bits, a denser topology, or choco"
            )
        return numbers


@dataclass(frozen=True)
class Choco(Gossip):
    """Every worker has a public copy ``x^`` that lags behind its model; they pull neighbours together.

    ::

        x^i  = x^i + gamma sum_j W_ij (x^^j - x^^i)
        q^i  = C(x^i - x^^i);     x^^i = x^^i + a q^i      own public copy and all replicas of it

    The sum of all models is preserved, whatever the compressor. ``C`` must be contractive: an unbiased
    compressor with relative error ``omega`` is damped by ``a = 1/(1+omega)``. ``gamma=None`` takes
    :func:`default_gamma`; too large diverges.

    Source: Koloskova et al., ICML 2019 and ICLR 2020 (the order of the latter: mixing does not wait for the
    wire). We differ: public copies start from the common model instead of zero; each is kept (the paper's
    appendix keeps their weighted sum), so that a lost neighbour can be left out and no rounding error builds
    up. ``omega`` is measured on Gaussian data, where the authors' code takes its bound. Bytes: degree x
    payload. Memory: one model per neighbour and one of its own.
    """

    replicas: ClassVar[bool] = True

    gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            check_step(self.gamma, "gamma")

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "public": FlatBuffer(x.clone(), context.layout),
            "replicas": copies(x, self.row(context), context.layout),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        gamma, a = self.tuned(context.layout)
        public, replicas = state["public"].data, tensors(state["replicas"])
        # x + gamma (sum_j W_ij x^_j - x^_i), and how far that is from x^_i
        model, difference = pull(x, public, *in_order(self.row(context), public, replicas), gamma)
        sent = self.encode(difference, context)
        _, messages = yield from self.send(sent, context)
        # Owner and neighbours move their copies of the model by the same bytes: they stay bit-equal.
        public = self.advance(public, sent, context.layout, a)
        for j, payload in messages.items():
            replicas[j] = self.advance(replicas[j], payload, context.layout, a)
        state = {"public": FlatBuffer(public, context.layout), "replicas": buffers(replicas, context.layout)}
        return agreed(model, state)

    def tuned(self, layout: Layout) -> tuple[float, float]:
        """``gamma`` and the damping ``a``."""
        contraction = measured_contraction(self.compressor, layout)
        gamma = default_gamma(contraction.delta) if self.gamma is None else self.gamma
        return gamma, contraction.damping

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        numbers = super().conditions(layout, size)
        delta = measured_contraction(self.compressor, layout).delta
        gap, beta = numbers["spectral_gap"], numbers["mu"]
        proven = gap**2 * delta / (16 * gap + gap**2 + 4 * beta**2 + 2 * gap * beta**2 - 8 * gap * delta)
        gamma, a = self.tuned(layout)
        return {**numbers, "delta": delta, "gamma": gamma, "gamma_proven": proven, "damping": a}


@dataclass(frozen=True)
class DeepSqueeze(Gossip):
    """Mix compressed models, with error feedback on what the compressor left out.

    ::

        v^i = x^i + e^i;    c^i = a C(v^i);    e^i = v^i - c^i
        x^i = x^i + eta sum_j W_ij (c^j - c^i)

    No replicas are kept, so the topology may change. Models are compressed, not differences: ``eta`` must be
    small. ``C`` must be contractive: an unbiased compressor with relative error ``omega`` is damped by
    ``a = 1/(1+omega)``, for its errors would feed on each other otherwise; ``a = 1`` for all others.

    Source: Tang et al., "DeepSqueeze", 2019. We differ: the damping; ``omega`` is measured on Gaussian data.
    Bytes: degree x payload. Memory: one model.
    """

    eta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step(self.eta, "eta")

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {"residual": FlatBuffer(torch.zeros_like(x), context.layout)}

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        v = x + state["residual"].data
        sent = self.encode(v, context)
        row, messages = yield from self.send(sent, context)
        damping = measured_contraction(self.compressor, context.layout).damping
        mine = self.damped(sent, context.layout, damping)
        theirs = {j: self.damped(payload, context.layout, damping) for j, payload in messages.items()}
        # Around one's own c, not x: what is added is then a difference of compressed models, which vanishes
        # where all agree, and the sum over workers stays what it was.
        model, _ = pull(x, mine, *in_order(row, mine, theirs), self.eta)
        return agreed(model, {"residual": FlatBuffer(v - mine, context.layout)})

    def damped(self, payload: Payload, layout: Layout, damping: float) -> Tensor:
        """``a C(v)``."""
        values = self.compressor.decode(payload, layout)
        return values if damping == 1.0 else values.mul_(damping)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        numbers = super().conditions(layout, size)
        contraction = measured_contraction(self.compressor, layout)
        numbers |= {"delta": contraction.delta, "damping": contraction.damping, "eta": self.eta}
        if self.eta > contraction.delta:
            numbers["warning"] = (
                f"deepsqueeze's models drift apart where eta exceeds what the compressor leaves right: "
                f"eta = {self.eta:.3g}, and on Gaussian data {self.compressor} contracts by delta = "
                f"{contraction.delta:.3g}; use a smaller eta, more bits, or choco"
            )
        return numbers


def weighted(row: MixingRow, own: Tensor, theirs: Mapping[int, Tensor]) -> Tensor:
    """``sum_j W_ij x_j``, in rank order: on a complete graph everybody gets the same bits.

    Summed as ``x_k + sum_j W_ij (x_j - x_k)`` with *k* the lowest rank, because weights need not sum to 1 in
    float32: three times a third is more, and after a million steps models would have grown by some per cent.
    """
    return mix(*in_order(row, own, theirs))


def in_order(row: MixingRow, own: Tensor, theirs: Mapping[int, Tensor]) -> tuple[list[Tensor], list[float]]:
    """The models that are mixed, in rank order, and the weights of all but the first."""
    weights = dict(zip(row.neighbours, row.weights, strict=True)) | {row.rank: row.own}
    models = {**theirs, row.rank: own}
    return [models[j] for j in sorted(weights)], [weights[j] for j in sorted(weights)[1:]]


def copies(x: Tensor, row: MixingRow, layout: Layout) -> dict[str, FlatBuffer]:
    """A replica of each neighbour's model, which is the common one."""
    return {str(j): FlatBuffer(x.clone(), layout) for j in row.neighbours}


def tensors(replicas: Mapping[str, FlatBuffer]) -> dict[int, Tensor]:
    """The replicas, by rank."""
    return {int(j): buffer.data for j, buffer in replicas.items()}


def buffers(replicas: Mapping[int, Tensor], layout: Layout) -> dict[str, FlatBuffer]:
    """The replicas, as state."""
    return {str(j): FlatBuffer(replica, layout) for j, replica in replicas.items()}


def default_gamma(delta: float) -> float:
    """CHOCO's consensus step size where none is given: 1 for an exact compressor, 0.4 delta for a coarse one.

    A rule of thumb, not a theorem: in pure consensus on a ring, torus, star and complete graph, with top-k
    and random-k at 50, 10 and 1 %, sign, and 8, 4 and 2 bits, it never diverged and came near the best of a
    grid of step sizes. The proven one is some hundred times smaller.
    """
    return 0.4 * delta + 0.6 * delta**4
