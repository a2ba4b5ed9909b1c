"""GradiVeQ: gradients of convolutions by coefficients in a subspace that all ranks found in earlier ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import Broadcast, Rounds
from distcomp.compressors import Cast, Identity, Quantize
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import (
    SHAPES,
    AggregateResult,
    Method,
    PerParameter,
    State,
    StepContext,
    all_reduce_bytes,
    cut_state,
    join_state,
    mean,
)
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.from_compressor import from_compressor
from distcomp.methods.partition import Partition, merge, sides, split
from distcomp.methods.registry import method_of, register
from distcomp.methods.scheduled import EXACT
from distcomp.methods.slices import (
    Cycle,
    Slicing,
    Subspace,
    Unsliced,
    from_coefficients,
    from_slices,
    mixed,
    relative_loss,
    to_coefficients,
    to_slices,
)
from distcomp.payload import Part, Parts, Payload, body_bytes, wire_bytes

VOTES, REST = "votes", "rest"
"""What rides behind the coefficients: votes, a slice of their own (exact), and what is not sliced."""


@dataclass(frozen=True)
class GradiVeQ(Method):
    """Send the coefficients of a gradient in a subspace that all ranks know; they add up in an all-reduce.

    A convolution's gradient is cut into slices of K elements (:class:`Slicing`). In each cycle
    (:class:`Cycle`), over all ranks i, with mean gradients throughout (the paper sums; with ``mu`` for its
    ``mu/N`` that is the same)::

        learn       estimate = plain(x);  remember some of its slices;  sum all of them up
        at its end  mu_m = mean of slice m;  U = the d leading principal directions of the slices remembered
        compressed  c = mean_i(U^T (g_im - mu_m));   estimate = U c + mu_m
                    contribution_i = U U^T (g_im - mu_m) + mu_m

    d is chosen on gradients that U was not found from (:class:`Subspace`). A layer whose loss has grown on
    most ranks begins its next cycle at once; every layer counts its own steps, so any may be ahead of the
    others.

    On the wire: ``plain``'s bytes while it learns; then those of ``coefficients`` for ``d/K`` as many
    elements; at the end of learning ``8 d_max learn`` bytes per basis, from rank 0 in a tree.
    ``payload_bytes`` takes d at its most. What is no convolution, or too wide, goes in float32: behind the
    coefficients where these are float32, otherwise in an all-reduce of its own. Memory: ``learn + d_max``
    slices per basis and two elements per element.

    Source: Yu et al., "GradiVeQ", NeurIPS 2018. We differ: eigenvectors are rank 0's, for they differ from
    machine to machine, as a mixture of the samples, which all ranks hold to the same bit (K/learn times
    smaller than U); d is chosen on held-out gradients (in-sample energy flatters: noise reaches the paper's
    bound); every slice has its own mean; the rule for learning anew is spelled out (the paper names it
    only); any ``plain`` method may carry the learning phase and any stateless one the coefficients. Without
    error feedback what lies outside of the subspace stays at the means for a whole cycle, as in the paper.
    Applied to convolutions only, as there.

    Raises DistcompError for ``coefficients`` that keep a state, and for convolutions that arrive in pieces.
    """

    slicing: Slicing = field(default=Slicing())
    subspace: Subspace = field(default=Subspace())
    cycle: Cycle = field(default=Cycle())
    plain: Method = field(default=from_compressor(Quantize(4)))
    coefficients: Method = field(default=EXACT)

    needs = frozenset({SHAPES})

    def __post_init__(self) -> None:
        if self.coefficients.init(Layout.of([("c", (8,))])):
            raise DistcompError(
                f"{self.coefficients} keeps a state, and coefficients mean something else in each cycle; "
                "send them by a method that keeps none, such as qsgd:bits=8,error_feedback=false"
            )

    def init(self, layout: Layout) -> State:
        return self.assumed_state(layout, 0)

    def assumed_state(self, layout: Layout, step: int) -> State:
        """As if no layer had begun anew before its time, and every basis were as large as it may be."""
        _, layout = sides(self._unsliced, layout).layouts
        shapes = {param.name: self._shape(param) for param in layout.slices}

        def each(*shape_of: str) -> PerParameter:
            return PerParameter(
                {
                    name: torch.zeros([shape[axis] for axis in shape_of], dtype=torch.float32)
                    for name, shape in shapes.items()
                }
            )

        age = step % self.cycle.length
        known = {name: shape["most"] * (age >= self.cycle.learn) for name, shape in shapes.items()}
        return {
            "age": PerParameter({name: torch.tensor(age, dtype=torch.int64) for name in shapes}),
            "dims": PerParameter(
                {name: torch.tensor(dims, dtype=torch.int64) for name, dims in known.items()}
            ),
            "basis": each("bases", "most", "k"),
            "mean": each("slices", "k"),
            "total": each("slices", "k"),
            "samples": {_row(age): each("bases", "k") for age in range(self.cycle.learn)},
            "reference": PerParameter({name: torch.zeros(2, dtype=torch.float32) for name in shapes}),
            "plain": self.plain.init(layout),
        }

    @property
    def _unsliced(self) -> Unsliced:
        return Unsliced(slicing=self.slicing)

    def _shape(self, param: ParamSlice) -> dict[str, int]:
        bases, _, k = self.slicing.shape(param)
        return {
            "bases": bases,
            "slices": param.numel // k,
            "k": k,
            "most": self.subspace.most(k, self.cycle.learn),
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        others, sliced = sides(self._unsliced, context.layout).layouts
        if not sliced.slices:
            return AggregateResult((yield from mean(x, context)), lambda: x, state)
        if not others.slices:
            return (yield from self._convolutions(x, state, context))
        rest, x = split(x, self._unsliced, context.layout)
        inner = replace(context, layout=sliced)
        if self._rides(state, sliced):
            result, rest_mean = yield from self._compressed(x, state, inner, rest)
        else:
            rest_mean = yield from mean(rest, context)
            result = yield from self._convolutions(x, state, inner)
        return AggregateResult(
            merge(rest_mean, result.estimate, self._unsliced, context.layout),
            lambda: merge(rest, result.contribution(), self._unsliced, context.layout),
            result.state,
        )

    def _rides(self, state: State, sliced: Layout) -> bool:
        """Whether one float32 all-reduce carries everything."""
        ages = [int(state["age"][name]) for name in sliced.names]
        return self.coefficients == EXACT and min(ages) >= self.cycle.learn

    def _convolutions(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        learning = frozenset(n for n in context.layout.names if int(state["age"][n]) < self.cycle.learn)
        if len(learning) == len(context.layout.names):
            return (yield from self._learn(x, state, context))
        if not learning:
            return (yield from self._compressed(x, state, context, x[:0]))[0]
        return (yield from self._some_learn(x, state, context, learning))

    def _learn(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        """Send plainly; remember what came of it; at the end of the phase, find the bases."""
        result = yield from self.plain.aggregate(x, state["plain"], context)
        total, ages = PerParameter(state["total"]), PerParameter(state["age"])
        samples = {row: PerParameter(leaf) for row, leaf in state["samples"].items()}
        due = []
        for param, piece in context.layout.pieces(result.estimate):
            name, age = param.name, int(ages[param.name])
            _, share, k = self.slicing.shape(param)
            slices = to_slices(piece, param, k)
            samples[_row(age)][name] = slices[::share].clone()
            total[name] = slices + total[name] if age else slices  # a new cycle forgets the last one's
            ages[name] = ages[name] + 1
            if age + 1 == self.cycle.learn:
                due.append(param)
        new = {**state, "plain": result.state, "total": total, "samples": samples, "age": ages}
        if due:
            new = yield from self._bases_found(new, tuple(due), context)
        return replace(result, state=new)

    def _bases_found(
        self, state: dict[str, Any], due: tuple[ParamSlice, ...], context: StepContext
    ) -> Rounds[dict[str, Any]]:
        """Bases and means of the layers whose learning is over, by the mixtures that rank 0 broadcasts."""
        rows = range(self.cycle.learn)
        samples = [torch.stack([state["samples"][_row(age)][s.name] for age in rows], dim=1) for s in due]
        payload = Payload.empty(self._parts(due), samples[0].device)
        # Rank 0 alone: eigenvectors differ from machine to machine, in sign at the least.
        if context.rank == 0:
            for own, mixture, dims in zip(samples, *self._views(payload, due), strict=True):
                own_mixture, count = self.subspace.find(own)
                mixture.copy_(own_mixture)
                dims.fill_(count)
        answer: Payload = yield Broadcast(payload, source=0)
        new = {key: PerParameter(state[key]) for key in ("basis", "mean", "dims", "reference")}
        for param, own, mixture, dims in zip(due, samples, *self._views(answer, due), strict=True):
            name = param.name
            new["basis"][name] = mixed(mixture, own)
            new["mean"][name] = state["total"][name] * (self.subspace.centred / self.cycle.learn)
            new["dims"][name] = dims.long()
            new["reference"][name] = torch.zeros_like(state["reference"][name])
        return {**state, **new}

    def _mixtures(self, due: tuple[ParamSlice, ...]) -> list[tuple[int, int, int]]:
        shapes = [self._shape(param) for param in due]
        return [(shape["bases"], shape["most"], self.cycle.learn) for shape in shapes]

    def _parts(self, due: tuple[ParamSlice, ...]) -> Parts:
        values = sum(math.prod(shape) for shape in self._mixtures(due))
        return (Part("values", torch.float64, values), Part("indices", torch.int32, len(due)))

    def _views(self, payload: Payload, due: tuple[ParamSlice, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """The mixture and d of each layer, as they lie in a payload."""
        shapes = self._mixtures(due)
        flat = torch.split(payload["values"], [math.prod(shape) for shape in shapes])
        return [values.view(shape) for values, shape in zip(flat, shapes, strict=True)], list(
            payload["indices"]
        )

    def _compressed(
        self, x: Tensor, state: State, context: StepContext, rest: Tensor
    ) -> Rounds[tuple[AggregateResult, Tensor]]:
        """Send coefficients, behind them a vote of each layer for learning anew, and behind these what rides;
        the mean of that beside the result."""
        known = [_Known.of(param, state) for param in context.layout.slices]
        coefficients, votes = [], []
        reference, ages = PerParameter(state["reference"]), PerParameter(state["age"])
        for layer, (param, piece) in zip(known, context.layout.pieces(x), strict=True):
            slices = to_slices(piece, param, layer.mean.shape[1])
            coefficients.append(to_coefficients(slices, layer.basis, layer.mean).reshape(-1))
            if self.cycle.retrain:
                loss = relative_loss(slices, coefficients[-1], layer.mean)
                vote, reference[param.name] = self._judge(loss, ages[param.name], reference[param.name])
                votes.append(vote)
        sizes = tuple(c.numel() for c in coefficients)
        layout = _coefficients(context.layout.names, sizes, len(votes), rest.numel())
        # The mean of votes of 0 and 1 is the share of ranks that vote: no round of its own.
        own = torch.cat([*coefficients, x.new_tensor(votes), rest])
        result = yield from self.coefficients.aggregate(own, {}, replace(context, layout=layout))
        agreed = result.estimate[: own.numel() - rest.numel()]
        anew = agreed[agreed.numel() - len(votes) :].tolist() or [0.0] * len(known)
        for layer, share in zip(known, anew, strict=True):
            # Most ranks for it: age 0, so that the layer learns from the next step on.
            ages[layer.param.name] = (ages[layer.param.name] + 1) % self.cycle.length * (share <= 0.5)
        compressed = AggregateResult(
            _restored(agreed, known, x),
            lambda: _restored(result.contribution(), known, x),
            {**state, "age": ages, "reference": reference},
        )
        return compressed, result.estimate[agreed.numel() :]

    def _judge(self, loss: float, age: Tensor, reference: Tensor) -> tuple[float, Tensor]:
        """This rank's vote for learning anew; what it compares with is gathered in the first steps."""
        if int(age) - self.cycle.learn < self.cycle.watch:
            return 0.0, reference + reference.new_tensor([loss, 1.0])  # a sum and a count: their mean
        total, count = reference.tolist()
        return float(loss * count > self.cycle.retrain * total), reference

    def _some_learn(
        self, x: Tensor, state: State, context: StepContext, learning: frozenset[str]
    ) -> Rounds[AggregateResult]:
        """Layers that began to learn anew at different times: one part after the other."""
        whole, results = cut_state(state), []
        for inside in (True, False):
            part = _part(context.layout, learning, inside)
            pieces = [piece for s, piece in context.layout.pieces(x) if (s.name in learning) is inside]
            before = join_state(whole, self.init(part))
            result = yield from self._convolutions(torch.cat(pieces), before, replace(context, layout=part))
            whole.update(cut_state(result.state))
            results.append((part, result))

        def together(parts: list[tuple[Layout, Tensor]]) -> Tensor:
            views = {s.name: piece for part, buffer in parts for s, piece in part.pieces(buffer)}
            return torch.cat([views[name] for name in context.layout.names])

        return AggregateResult(
            together([(part, result.estimate) for part, result in results]),
            lambda: together([(part, result.contribution()) for part, result in results]),
            join_state(whole, state),
        )

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        others, layout = sides(self._unsliced, layout).layouts
        age = step % self.cycle.length
        others_bytes = all_reduce_bytes(4 * others.numel, size) if others.slices else 0
        if age >= self.cycle.learn and layout.slices:
            most = {s.name: self._shape(s)["slices"] * self._shape(s)["most"] for s in layout.slices}
            votes = len(most) if self.cycle.retrain else 0
            riding = others.numel if self.coefficients == EXACT else 0
            sent = _coefficients(tuple(most), tuple(most.values()), votes, riding)
            return self.coefficients.payload_bytes(sent, size, step) + (0 if riding else others_bytes)
        plain = others_bytes + (self.plain.payload_bytes(layout, size, step) if layout.slices else 0)
        if age + 1 < self.cycle.learn or not layout.slices:
            return plain
        parts, tree = self._parts(layout.slices), (size - 1) / size
        header = wire_bytes(parts) - body_bytes(parts)
        return plain + round(header * tree) + sum(round(part.nbytes * tree) for part in parts)


@dataclass(frozen=True, eq=False)
class _Known:
    """What all ranks know of a layer while it is compressed."""

    param: ParamSlice
    basis: Tensor
    mean: Tensor

    @staticmethod
    def of(param: ParamSlice, state: State) -> _Known:
        dims = int(state["dims"][param.name])
        return _Known(param, state["basis"][param.name][:, :dims], state["mean"][param.name])


def _restored(coefficients: Tensor, known: list[_Known], like: Tensor) -> Tensor:
    """The flat buffer that coefficients stand for."""
    out = torch.empty_like(like)
    layout = Layout(tuple(layer.param for layer in known))
    at = 0
    for layer, (param, piece) in zip(known, layout.pieces(out), strict=True):
        slices, dims = layer.mean.shape[0], layer.basis.shape[1]
        own = coefficients[at : at + slices * dims].view(slices, dims)
        from_slices(from_coefficients(own, layer.basis, layer.mean), param, piece)
        at += slices * dims
    return out


def _row(age: int) -> str:
    return f"{age:04}"


@lru_cache(maxsize=64)
def _part(layout: Layout, names: frozenset[str], inside: bool) -> Layout:
    return layout.select(lambda param: (param.name in names) is inside)


@lru_cache(maxsize=64)
def _coefficients(names: tuple[str, ...], numels: tuple[int, ...], votes: int, rest: int) -> Layout:
    """Coefficients of each layer, then the votes, then what rides."""
    sent = [*zip(names, numels, strict=True), (VOTES, votes), (REST, rest)]
    return Layout.of([(name, (numel,)) for name, numel in sent if numel])


def _method_of_width(bits: int, what: str) -> Method:
    """A stateless, unbiased (or nearly so) way to send numbers at a width."""
    if bits not in (*range(2, 9), 16, 32):
        raise DistcompError(f"{what} takes 2 to 8 bits, 16 (bfloat16) or 32, not {bits}")
    return from_compressor({32: Identity(), 16: Cast("bf16")}.get(bits) or Quantize(bits))


@register(
    paper="Yu et al., GradiVeQ: vector quantization for bandwidth-efficient aggregation, NeurIPS 2018",
    wire="learning 2 (n-1)/n d plain_bits/8; compressed 2 (n-1)/n 4d/ratio at most; bases once a cycle",
    summable=True,
    biased=True,
    deviations="rank 0 broadcasts the basis; its size is chosen on held-out gradients; a mean for "
    "every slice; the rule for learning anew is spelled out",
    limitations="where gradients do not stay in a subspace, as in wide dense layers; its bases cost "
    "seconds of computing",
)
def gradiveq(
    ratio: float = 8.0,
    loss: float = 0.01,
    learn: int = 100,
    compressed: int = 400,
    mean: str = "pca",
    plain_bits: int = 4,
    coefficient_bits: int = 32,
    retrain: float = 1.5,
    error_feedback: bool = False,
    others: Method | str = EXACT,
) -> Method:
    """Send convolutions by their gradients' coefficients in a subspace found in earlier gradients.

    See :class:`distcomp.methods.GradiVeQ`. ``ratio``: at least so many elements to a coefficient; ``loss``:
    energy that may be lost for fewer; ``learn`` steps at ``plain_bits`` and ``compressed`` ones at
    ``coefficient_bits`` make a cycle; ``mean``: ``pca`` or ``zero`` for what lies outside; ``retrain``:
    growth of the loss at which most ranks cut a cycle short (0: never); ``error_feedback``: owe what was
    not sent; ``others``: how all that is no convolution, or one of over 4096 filters times depth, is
    sent (``"powersgd"``). The paper begins after 2500 plain steps: ``warmup("gradiveq", 2500)``.
    """
    if mean not in ("pca", "zero"):
        raise DistcompError(f"gradiveq takes the mean pca or zero, not {mean!r}")
    method = GradiVeQ(
        subspace=Subspace(ratio, loss, centred=mean == "pca"),
        cycle=Cycle(learn, compressed, retrain),
        plain=_method_of_width(plain_bits, "plain_bits"),
        coefficients=_method_of_width(coefficient_bits, "coefficient_bits"),
    )
    whole: Method = ErrorFeedback(method) if error_feedback else method
    return whole if others == EXACT else Partition(Unsliced(), method_of(others), whole)
