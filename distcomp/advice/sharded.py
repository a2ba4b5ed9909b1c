"""What a sharded model exchanges in a step: gathers of weights, reductions of gradients, and replicas.

A setting is said as it is attached: ``METHOD``, or ``METHOD weights=GATHER``; ``fsdp2`` is FSDP2 by itself.
Where ``shards`` of all ranks hold a model together, ``ranks / shards`` hold the same shard: a method then
acts across those, and FSDP's own collectives inside, as with ``attach(..., replicas=)``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from distcomp.advice.predict import ProfiledMethod
from distcomp.advice.profile import (
    REPEATS,
    ProfiledExchange,
    ProfiledRound,
    ToProfile,
    clock,
    exchanges_of,
    profiled,
)
from distcomp.attaching.observe_shards import ObservedShardedSteps, ShardedCall
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.codistill import Codistillation
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.methods.base import State
from distcomp.methods.reduce_scatter import owned_layout, to_shards
from distcomp.methods.row_owners import needs_parameters, to_row_owners
from distcomp.methods.weight_gather import TypedGather, WeightGather, parse_weight_gather
from distcomp.network.request_sizes import Groups, RequestSizes

PLAIN = "fsdp2"
"""FSDP2 by itself, with float32 or what its policy says."""
KEPT = "gather:compressor=(qsgd:bits=8),reuse=true"
MOVED = "difference:compressor=(qsgd:bits=4)"
SETTINGS = (
    PLAIN, "bf16", "qsgd:bits=4", "qsgd:bits=4 weights=qsgd:bits=8", f"qsgd:bits=4 weights={KEPT}",
    f"qsgd:bits=4 weights={MOVED}", f"qsgd:bits=1 weights={MOVED}",
)  # fmt: skip
"""What is compared where nothing is asked for."""
ACROSS = (PLAIN, "bf16", "qsgd:bits=4", "qsgd:bits=1", "powersgd:rank=4")
"""The same, across replicas."""


@dataclass(frozen=True)
class ShardedSetting:
    """What is attached; ``method`` None is FSDP2 by itself, ``weights`` None its own gathers."""

    text: str
    method: Method | Averaging | MultiLevel | None
    weights: WeightGather | None

    @staticmethod
    def of(text: str) -> ShardedSetting:
        """Raises DistcompError for a method or a gather that there is none of, or that is not predicted."""
        method, joined, weights = text.partition(" weights=")
        how = parse_weight_gather(weights.strip()) if joined else None
        if how is not None and how.keeps_frozen:
            raise DistcompError(
                f"{text}: which weights are frozen is not observed, and keep_frozen is not predicted; "
                "leave it out, and what is predicted is the first step"
            )
        if method.strip() == PLAIN:
            if how is not None:
                raise DistcompError(
                    f"{text}: weights= is attached with a method; write identity weights={weights} for "
                    "gradients as they are"
                )
            return ShardedSetting(text, None, None)
        if method.strip() == "ddp" or method.startswith("torch:"):
            raise DistcompError(
                f"{method} needs DistributedDataParallel, and this model is sharded; compare with {PLAIN}"
            )
        parsed = parse(method.strip())
        if isinstance(parsed, Codistillation):
            raise DistcompError(f"{method} exchanges predictions, and no shards; leave it out")
        return ShardedSetting(text, parsed, how)


@dataclass(frozen=True)
class Placement:
    """``shards`` ranks hold a model together, and there are so many ``replicas`` of it."""

    shards: int
    replicas: int

    @staticmethod
    def of(ranks: int, shards: int) -> Placement:
        """Raises DistcompError where they do not divide."""
        if shards < 1 or ranks % shards:
            raise DistcompError(
                f"{ranks} ranks are no whole number of replicas of {shards} shards; give shards that divide "
                "the ranks"
            )
        return Placement(shards, ranks // shards)

    @property
    def inside(self) -> Groups | None:
        """Who holds a model together; None where all do."""
        if self.replicas == 1:
            return None
        return tuple(tuple(range(k * self.shards, (k + 1) * self.shards)) for k in range(self.replicas))

    @property
    def across(self) -> Groups:
        """Who holds the same shard."""
        ranks = self.shards * self.replicas
        return tuple(tuple(range(shard, ranks, self.shards)) for shard in range(self.shards))


def profile_sharded(text: str, observed: ObservedShardedSteps, ranks: int, shards: int) -> ProfiledMethod:
    """The exchanges of a step, in FSDP's order, run here with themselves and timed.

    Raises DistcompError for what cannot be attached so, and for shards that do not divide the ranks.
    """
    setting, placement = ShardedSetting.of(text), Placement.of(ranks, shards)
    _refuse(setting, placement)
    gathers, reductions = _gathers(setting, observed, placement), _reductions(setting, observed, placement)
    profiles = [
        gathers[call.name, call.in_backward] if call.kind == "gather" else reductions[call.name]
        for call in observed.calls
    ]
    if isinstance(setting.method, Averaging | MultiLevel):
        profiles += _averaged(setting.method, observed, placement)
    return ProfiledMethod(text, ranks, tuple(profiles), shards=shards)


def _refuse(setting: ShardedSetting, placement: Placement) -> None:
    averages = isinstance(setting.method, Averaging | MultiLevel)
    if averages and placement.replicas == 1:
        raise DistcompError(
            f"{setting.text} averages models, of which there is one in {placement.shards} shards; give fewer "
            "shards than ranks"
        )
    if setting.weights is not None and placement.replicas > 1:
        raise DistcompError(
            f"{setting.text}: with replicas a method acts across them, and weights are gathered inside; "
            "leave weights= out, or shard over all ranks"
        )


Gathers = dict[tuple[str, bool], ProfiledExchange]
"""By buffer, and whether within backward."""


def _gathers(setting: ShardedSetting, observed: ObservedShardedSteps, placement: Placement) -> Gathers:
    calls = {(call.name, call.in_backward): call for call in observed.calls if call.kind == "gather"}
    if setting.weights is None:
        return {key: _plain(call, placement) for key, call in calls.items()}
    how, shards = setting.weights, placement.shards
    buffers = {call.name: call for call in calls.values()}
    parts = [ToProfile(TypedGather(how, call.dtype), call.shard(shards), {}) for call in buffers.values()]
    found = dict(zip(buffers, profiled(parts, shards), strict=True))
    return {key: _gathered(how, call, *found[call.name], shards) for key, call in calls.items()}


def _gathered(
    how: WeightGather, call: ShardedCall, exchange: ProfiledExchange, state: State, shards: int
) -> ProfiledExchange:
    """With the copy into FSDP's buffer; in backward without an exchange, where what was gathered is kept."""
    layout = call.shard(shards)
    whole = torch.empty(shards * layout.numel, dtype=call.dtype)
    if call.in_backward and how.again(state, layout, shards, call.dtype) is not None:

        def again() -> None:
            kept = how.again(state, layout, shards, call.dtype)
            assert kept is not None
            whole.copy_(kept)

        return ProfiledExchange((), _median_s(again))
    estimate = torch.ones(whole.numel(), dtype=torch.float32)
    chunked = (replace(one, ask=replace(one.ask, chunked=True)) for one in exchange.rounds)
    return ProfiledExchange(tuple(chunked), exchange.last_s + _median_s(lambda: whole.copy_(estimate)))


def _reductions(
    setting: ShardedSetting, observed: ObservedShardedSteps, placement: Placement
) -> dict[str, ProfiledExchange]:
    calls = {call.name: call for call in observed.calls if call.kind == "reduce"}
    inside = {name: _plain(call, placement) for name, call in calls.items()}
    method = setting.method
    if isinstance(method, Averaging | MultiLevel):
        return inside
    if placement.replicas > 1:
        found = _across(method, list(calls.values()), placement)
        return {name: _then(inside[name], one) for name, one in zip(calls, found, strict=True)}
    if method is None:
        return inside
    if needs_parameters(method):
        talks = to_row_owners(method)
        parts = [ToProfile(talks, call.layout, talks.init(call.layout)) for call in calls.values()]
    else:
        talks, layouts = to_shards(method), [call.owned(placement.shards) for call in calls.values()]
        parts = [ToProfile(talks, layout, talks.init(layout)) for layout in layouts]
    return {
        name: exchange for name, (exchange, _) in zip(calls, profiled(parts, placement.shards), strict=True)
    }


def _across(
    method: Method | None, calls: Sequence[ShardedCall], placement: Placement
) -> list[ProfiledExchange]:
    """What those who hold the same shard exchange of each buffer."""
    shards = [call.shard(placement.shards) for call in calls]
    if method is None:
        pairs = zip(shards, calls, strict=True)
        return [
            _round("ring_all_reduce", shard.numel * call.dtype.itemsize, placement.across)
            for shard, call in pairs
        ]
    layouts = shards if needs_parameters(method) else [owned_layout(s.names[0], s.numel, 1) for s in shards]
    parts = [ToProfile(method, layout, method.init(layout)) for layout in layouts]
    return [_placed(one, placement.across) for one, _ in profiled(parts, placement.replicas)]


def _averaged(
    method: Averaging | MultiLevel, observed: ObservedShardedSteps, placement: Placement
) -> list[ProfiledExchange]:
    """What islands exchange of their models, after the step."""
    buffers = {call.name: call for call in observed.calls if call.kind == "reduce"}
    slices = [param for call in buffers.values() for param in call.shard(placement.shards).slices]
    found = exchanges_of(method, Layout(tuple(slices)), placement.replicas)
    return [_placed(exchange, placement.across) for exchange in found]


def _plain(call: ShardedCall, placement: Placement) -> ProfiledExchange:
    """FSDP's own collective. Gloo's reduce-scatter is its all-reduce."""
    nbytes = placement.shards * call.shard(placement.shards).numel * call.dtype.itemsize
    reduction = "ring_all_reduce" if call.device == "cpu" else "ring_reduce_scatter"
    return _round("ring_all_gather" if call.kind == "gather" else reduction, nbytes, placement.inside)


def _round(kind: str, nbytes: float, groups: Groups | None) -> ProfiledExchange:
    return ProfiledExchange((ProfiledRound(0.0, RequestSizes(kind, (nbytes,), groups)),), 0.0)


def _then(first: ProfiledExchange, second: ProfiledExchange) -> ProfiledExchange:
    return ProfiledExchange((*first.rounds, *second.rounds), second.last_s)


def _placed(exchange: ProfiledExchange, groups: Groups) -> ProfiledExchange:
    rounds = (replace(one, ask=one.ask.placed(groups)) for one in exchange.rounds)
    return replace(exchange, rounds=tuple(rounds))


def _median_s(work: Callable[[], object]) -> float:
    times_s = []
    for _ in range(2 + REPEATS):
        begin_s = clock()
        work()
        times_s.append(clock() - begin_s)
    return statistics.median(times_s[2:])
