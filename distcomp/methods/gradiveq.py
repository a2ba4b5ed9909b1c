"""GradiVeQ: gradients of convolutions by coefficients in a subspace that all ranks found in earlier ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import Broadcast, Rounds
from distcomp.compressors import Cast, Identity, Quantize
from distcomp.errors import DistcompError
from distcomp.kernels.subspace import Known, Sliced, project_slices, restore
from distcomp.layout import FlatBuffer, Layout
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
    DTYPES,
    FILTER,
    Cycle,
    Slicing,
    Subspace,
    Unsliced,
    mixed,
    relative_losses,
    samples_of,
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
    coefficients where these are float32, otherwise in an all-reduce of its own. Memory: ``learn + d_max/2``
    slices per basis, and two elements per element.

    Source: Yu et al., "GradiVeQ", NeurIPS 2018. We differ: eigenvectors are rank 0's, for they differ from
    machine to machine, as a mixture of the samples, which all ranks hold to the same bit; U is rounded to
    bfloat16, and coefficients, estimate and contribution are those of the rounded U; it is found from all
    slices in turn, each minus its own mean; slices may be filters; d is chosen on held-out gradients
    (in-sample energy flatters: noise reaches the paper's bound); the rule for learning anew is spelled out;
    any ``plain`` method may carry the learning phase and any stateless one the coefficients. Without error
    feedback what lies outside of the subspace stays at the means for a whole cycle, as in the paper.

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
        known = zip(layout.names, self._slices(layout), strict=True)
        sliced, age = dict(known), step % self.cycle.length

        def numbers(of: Callable[[Sliced], int]) -> PerParameter:
            return PerParameter(
                {name: torch.tensor(of(one), dtype=torch.int64) for name, one in sliced.items()}
            )

        def each(of: Callable[[Sliced], tuple[int, ...]], dtype: torch.dtype) -> PerParameter:
            return PerParameter({name: torch.zeros(of(one), dtype=dtype) for name, one in sliced.items()})

        def flat() -> FlatBuffer:
            return FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout)

        return {
            "age": numbers(lambda _: age),
            "dims": numbers(lambda one: one.most * (age >= self.cycle.learn)),
            "basis": each(lambda one: (one.bases, one.most, one.k), DTYPES[self.subspace.bits]),
            "offset": each(lambda one: (one.slices, one.most), torch.float32),
            "mean": flat(),
            "total": flat(),
            "samples": {
                _row(row): each(lambda one: (one.bases, one.k), torch.float32)
                for row in range(self.cycle.learn)
            },
            "reference": each(lambda _: (2,), torch.float32),
            "plain": self.plain.init(layout),
        }

    @property
    def _unsliced(self) -> Unsliced:
        return Unsliced(slicing=self.slicing)

    def _slices(self, layout: Layout) -> tuple[Sliced, ...]:
        """Where each layer's slices lie, with as many directions as there may be."""
        return layout.remember(("slices", self.slicing, self.subspace, self.cycle), lambda: self._cut(layout))

    def _cut(self, layout: Layout) -> tuple[Sliced, ...]:
        each = []
        for param, at in zip(layout.slices, layout.offsets, strict=True):
            most = self.subspace.most(self.slicing.length(param) or 0, self.cycle.learn)
            each.append(self.slicing.sliced(param, at, most, most))
        return tuple(each)

    def _known(self, layout: Layout, state: State) -> Known:
        """The same with the directions in use: made once in a cycle."""
        dims = tuple(torch.stack([state["dims"][name] for name in layout.names]).tolist())
        last = layout.remember(("known", self.slicing, self.subspace, self.cycle), dict[Any, Known])
        if dims not in last:
            last.clear()
            slices = zip(self._slices(layout), dims, strict=True)
            last[dims] = Known(tuple(replace(one, dims=own) for one, own in slices))
        return last[dims]

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
        return self.coefficients == EXACT and min(_ages(state, sliced)) >= self.cycle.learn

    def _convolutions(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        names = context.layout.names
        ages = zip(names, _ages(state, context.layout), strict=True)
        learning = frozenset(name for name, age in ages if age < self.cycle.learn)
        if len(learning) == len(names):
            return (yield from self._learn(x, state, context))
        if not learning:
            return (yield from self._compressed(x, state, context, x[:0]))[0]
        return (yield from self._some_learn(x, state, context, learning))

    def _learn(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        """Send plainly; remember what came of it; at the end of the phase, find the bases."""
        result = yield from self.plain.aggregate(x, state["plain"], context)
        layout, estimate = context.layout, result.estimate
        ages, slices = _ages(state, layout), self._slices(layout)
        total = state["total"].data + estimate
        samples = {**state["samples"]}
        for name, one, age in zip(layout.names, slices, ages, strict=True):
            if age == 0:  # a new cycle forgets the last one's
                total[one.at : one.at + one.numel] = estimate[one.at : one.at + one.numel]
            if samples[_row(age)] is state["samples"][_row(age)]:
                samples[_row(age)] = PerParameter(samples[_row(age)])
            samples[_row(age)][name] = samples_of(estimate, one, age)
        new = {
            **state,
            "plain": result.state,
            "total": FlatBuffer(total, layout),
            "samples": samples,
            "age": _per_layer(state["age"], layout, [age + 1 for age in ages]),
        }
        due = tuple(i for i, age in enumerate(ages) if age + 1 == self.cycle.learn)
        if due:
            new = yield from self._bases_found(new, due, context)
        return replace(result, state=new)

    def _bases_found(
        self, state: dict[str, Any], due: tuple[int, ...], context: StepContext
    ) -> Rounds[dict[str, Any]]:
        """Bases and means of the layers whose learning is over, by the mixtures that rank 0 broadcasts."""
        names, slices = context.layout.names, self._slices(context.layout)
        mean = state["mean"].data.clone()
        for one in (slices[i] for i in due):
            own = state["total"].data[one.at : one.at + one.numel]
            mean[one.at : one.at + one.numel] = own * (self.subspace.centred / self.cycle.learn)
        samples = [self._centred_samples(state, names[i], slices[i], mean) for i in due]
        layers = [slices[i] for i in due]
        payload = Payload.empty(self._parts(layers), mean.device)
        # Rank 0 alone: eigenvectors differ from machine to machine, in sign at the least.
        if context.rank == 0:
            for own, mixture, dims in zip(samples, *self._views(payload, layers), strict=True):
                own_mixture, count = self.subspace.find(own)
                mixture.copy_(own_mixture)
                dims.fill_(count)
        answer: Payload = yield Broadcast(payload, source=0)
        new = {key: PerParameter(state[key]) for key in ("basis", "offset", "dims", "reference")}
        for i, own, mixture, dims in zip(due, samples, *self._views(answer, layers), strict=True):
            name, one = names[i], slices[i]
            basis = mixed(mixture, own, self.subspace.bits)
            new["basis"][name] = basis
            nothing = [torch.zeros_like(state["offset"][name])]
            of_means = project_slices(mean, [basis], nothing, Known((one,)))
            new["offset"][name] = of_means.view(one.slices, one.most)
            new["dims"][name] = dims.long()
            new["reference"][name] = torch.zeros_like(state["reference"][name])
        return {**state, **new, "mean": FlatBuffer(mean, context.layout)}

    def _centred_samples(self, state: State, name: str, one: Sliced, mean: Tensor) -> Tensor:
        """``[B, T, K]``: what is remembered of a layer, minus the means of its slices."""
        rows = [
            state["samples"][_row(age)][name] - samples_of(mean, one, age) for age in range(self.cycle.learn)
        ]
        return torch.stack(rows, dim=1)

    def _mixtures(self, layers: Sequence[Sliced]) -> list[tuple[int, int, int]]:
        return [(one.bases, one.most, self.cycle.learn) for one in layers]

    def _parts(self, layers: Sequence[Sliced]) -> Parts:
        values = sum(math.prod(shape) for shape in self._mixtures(layers))
        return (Part("values", torch.float64, values), Part("indices", torch.int32, len(layers)))

    def _views(self, payload: Payload, layers: Sequence[Sliced]) -> tuple[list[Tensor], list[Tensor]]:
        """The mixture and d of each layer, as they lie in a payload."""
        shapes = self._mixtures(layers)
        flat = torch.split(payload["values"], [math.prod(shape) for shape in shapes])
        return [values.view(shape) for values, shape in zip(flat, shapes, strict=True)], list(
            payload["indices"]
        )

    def _compressed(
        self, x: Tensor, state: State, context: StepContext, rest: Tensor
    ) -> Rounds[tuple[AggregateResult, Tensor]]:
        """Send coefficients, behind them a vote of each layer for learning anew, and behind these what rides;
        the mean of that beside the result."""
        layout = context.layout
        known, mean = self._known(layout, state), state["mean"].data
        bases = [state["basis"][name] for name in layout.names]
        offsets = [state["offset"][name] for name in layout.names]
        coefficients = project_slices(x, bases, offsets, known)  # U^T g - U^T mu
        votes, reference = x[:0], state["reference"]
        if self.cycle.retrain:
            losses = relative_losses(x, mean, coefficients, known, self.subspace.bits)
            votes, reference = self._judge(losses, state, layout)
        sent = _coefficients(layout.names, tuple(known.sizes), len(votes), rest.numel())
        # The mean of votes of 0 and 1 is the share of ranks that vote: no round of its own.
        own = torch.cat([coefficients, votes.to(x), rest])
        result = yield from self.coefficients.aggregate(own, {}, replace(context, layout=sent))
        agreed = result.estimate[: own.numel() - rest.numel()]
        shares = agreed[known.numel :].tolist() or [0.0] * len(bases)
        # Most ranks for it: age 0, so that the layer learns from the next step on.
        ages = [
            (age + 1) % self.cycle.length * (share <= 0.5)
            for age, share in zip(_ages(state, layout), shares, strict=True)
        ]

        def restored(coefficients: Tensor) -> Tensor:
            out = torch.empty_like(x)
            restore(coefficients, bases, mean, out, known)
            return out

        compressed = AggregateResult(
            restored(agreed),
            lambda: restored(result.contribution()),
            {**state, "age": _per_layer(state["age"], layout, ages), "reference": reference},
        )
        return compressed, result.estimate[agreed.numel() :]

    def _judge(self, losses: Tensor, state: State, layout: Layout) -> tuple[Tensor, PerParameter]:
        """This rank's votes for learning anew; what it compares with is gathered in the first steps."""
        reference = torch.stack([state["reference"][name] for name in layout.names])
        watched = [float(age - self.cycle.learn < self.cycle.watch) for age in _ages(state, layout)]
        losses, watching = losses.to(reference), torch.tensor(watched, dtype=torch.float32).to(reference)
        total, count = reference.unbind(1)
        votes = (losses * count > self.cycle.retrain * total) * (1 - watching)
        # A sum and a count: their mean.
        gathered = reference + watching.unsqueeze(1) * torch.stack([losses, torch.ones_like(losses)], dim=1)
        return votes, PerParameter(zip(layout.names, gathered.unbind(0), strict=True))

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
            most = Known(self._slices(layout)).sizes
            votes = len(most) if self.cycle.retrain else 0
            riding = others.numel if self.coefficients == EXACT else 0
            sent = _coefficients(layout.names, tuple(most), votes, riding)
            return self.coefficients.payload_bytes(sent, size, step) + (0 if riding else others_bytes)
        plain = others_bytes + (self.plain.payload_bytes(layout, size, step) if layout.slices else 0)
        if age + 1 < self.cycle.learn or not layout.slices:
            return plain
        parts, tree = self._parts(self._slices(layout)), (size - 1) / size
        header = wire_bytes(parts) - body_bytes(parts)
        return plain + round(header * tree) + sum(round(part.nbytes * tree) for part in parts)


def _ages(state: State, layout: Layout) -> list[int]:
    ages: list[int] = torch.stack([state["age"][name] for name in layout.names]).tolist()
    return ages


def _per_layer(before: PerParameter, layout: Layout, numbers: list[int]) -> PerParameter:
    """A number for each layer, of the kind there was before."""
    each = before[layout.names[0]].new_tensor(numbers).unbind(0)
    return PerParameter(zip(layout.names, each, strict=True))


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
    deviations="slices along filters unless asked for places; rank 0 broadcasts the basis, in bfloat16, "
    "found from all slices in turn, its size chosen on held-out gradients; a mean for every slice; the rule "
    "for learning anew is spelled out",
    limitations="where gradients do not stay in a subspace, as in wide dense layers; its bases cost "
    "seconds of computing",
)
def gradiveq(
    ratio: float = 24.0,
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
    not sent; ``others``: how all that is no convolution, or one whose slices are over 4096 elements, is
    sent (``"powersgd"``). Slices are filters; the paper's are all filters' elements at a place:
    ``GradiVeQ(Slicing(), Subspace(8))``. It begins after 2500 plain steps:
    ``warmup("gradiveq", 2500)``.
    """
    if mean not in ("pca", "zero"):
        raise DistcompError(f"gradiveq takes the mean pca or zero, not {mean!r}")
    slicing = Slicing(along=FILTER)
    method = GradiVeQ(
        slicing,
        Subspace(ratio, loss, mean == "pca"),
        cycle=Cycle(learn, compressed, retrain),
        plain=_method_of_width(plain_bits, "plain_bits"),
        coefficients=_method_of_width(coefficient_bits, "coefficient_bits"),
    )
    whole: Method = ErrorFeedback(method) if error_feedback else method
    return whole if others == EXACT else Partition(Unsliced(slicing=slicing), method_of(others), whole)
