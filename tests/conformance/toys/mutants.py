"""Methods and compressors that each break one law. The conformance tests must find every one of them.

``BROKEN`` (written to the file ``MUTANTS``) says which test is to fail for which. Loaded as a pytest plugin,
it takes the place of everything registered. One method is sound, for comparison.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distcomp import compressors
from distcomp.collectives import AllGather, AllReduce, AllToAll, Rounds
from distcomp.compressors import Compressor, Identity, Quantize
from distcomp.layout import FlatBuffer, Layout, chunk_views
from distcomp.methods import (
    METHODS,
    AggregateResult,
    AllGatherMean,
    ErrorFeedback,
    Method,
    ReduceScatterMean,
    StepContext,
    register,
)
from distcomp.methods.base import State, all_reduce_bytes
from distcomp.methods.from_compressor import mean_of
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key
from distcomp.registry import load_all

load_all()  # rooms higher up enter their names now, and not again later
METHODS.clear()
import_module("tests.conformance.toys.averaging_toy")
BROKEN: dict[str, str] = {}


def breaks(test: str, biased: bool = True, summable: bool = True) -> Callable[[type], type]:
    """Register a class of methods as one that ``test`` must find."""

    def enter(kind: type) -> type:
        def recipe() -> Any:
            return kind()

        recipe.__name__, recipe.__doc__ = kind.__name__.lower(), kind.__doc__
        recipe.__annotations__ = {}
        BROKEN[recipe.__name__] = test
        register(paper="none", wire="2 (n-1)/n 4d", summable=summable, biased=biased)(recipe)
        return kind

    return enter


@dataclass(frozen=True)
class Mean(Method):
    """The exact mean, which breaks nothing; the others differ from it in one thing."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        total = yield AllReduce(x * (1.0 / context.size))
        return AggregateResult(total, lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return all_reduce_bytes(4 * layout.numel, size)


@breaks("test_neither_x_nor_the_state_is_changed")
class GivesAwayItsInput(Mean):
    """Hand x itself to the transport, which sums in it."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        kept = x.clone()
        total = yield AllReduce(x)
        return AggregateResult(total / context.size, lambda: kept, state)


@breaks("test_one_estimate_that_the_contributions_sum_to")
class ClaimsToHaveSentAll(Mean):
    """Send half and claim the whole as contribution."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        total = yield AllReduce(x * (0.5 / context.size))
        return AggregateResult(total, lambda: x, state)


@breaks("test_one_estimate_that_the_contributions_sum_to")
class KeepsItsOwnShareExact(Mean):
    """Add what one rank knows better to its own estimate alone."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        total = yield AllReduce(x.to(torch.bfloat16) / context.size)
        return AggregateResult(total.float() + 1e-3 * context.rank, lambda: x, state)


@breaks("test_one_estimate_that_the_contributions_sum_to", summable=False)
class LosesTheSecondStage(ReduceScatterMean):
    """Scatter-reduce in which nobody owes what the second encoding lost."""

    compressor: Compressor = Quantize(2)

    def __init__(self) -> None:
        object.__setattr__(self, "compressor", Quantize(2))

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        c, chunks = self.compressor, context.layout.split(context.size, self.compressor.alignment)
        sent = tuple(
            c.encode(view, chunk, context.private)
            for view, chunk in zip(chunk_views(x, chunks), chunks, strict=True)
        )
        received = yield AllToAll(sent)
        mean = mean_of(c, received, chunks[context.rank])
        answer = c.encode(mean, chunks[context.rank], context.shared)
        answers = yield AllGather(answer, parts=tuple(c.parts(chunk) for chunk in chunks))
        parts = [c.decode(payload, chunk) for payload, chunk in zip(answers, chunks, strict=True)]
        own = [c.decode(payload, chunk) for payload, chunk in zip(sent, chunks, strict=True)]
        return AggregateResult(torch.cat(parts), lambda: torch.cat(own), state)


@breaks("test_one_estimate_that_the_contributions_sum_to")
class UnderstatesItsBytes(Mean):
    """Declare half of what is sent."""

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return super().payload_bytes(layout, size, step) // 2


@breaks("test_the_bytes_of_a_step_do_not_depend_on_the_values")
class SkipsZeros(Mean):
    """Send nothing where there is nothing to send."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        if not x.any():
            return AggregateResult(x.clone(), lambda: x, state)
        return (yield from super().aggregate(x, state, context))


@breaks("test_the_same_conversation_twice_gives_the_same_bits")
class DrawsFromTheGlobalGenerator(Mean):
    """Add noise that no key decides."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        noisy = x + torch.rand_like(x) * x.abs()
        result = yield from super().aggregate(noisy, state, context)
        return replace(result, contribution=lambda: noisy)


@breaks("test_a_contribution_asked_for_twice_is_the_same")
class GivesOnce(Mean):
    """Scale the contribution in place."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        half = x / 2
        result = yield from super().aggregate(x, state, context)
        return replace(result, contribution=lambda: half.mul_(2))


@breaks("test_what_is_owed_is_what_was_given_less_the_contribution")
class DeductsHalf(Mean):
    """Deduct less in place than was contributed."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        result = yield from super().aggregate(x, state, context)
        return replace(result, subtract_contribution_=lambda residual: residual.sub_(x / 2))


@breaks("test_the_bytes_of_every_step_are_those_declared_for_it")
class SendsTwiceLater(Mean):
    """Ask again in the third step."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        if context.step == 2:
            yield AllReduce(x.clone())
        return (yield from super().aggregate(x, state, context))


@breaks("test_neither_x_nor_the_state_is_changed")
class UpdatesItsStateInPlace(Mean):
    """Keep a running sum in the tensor that was given."""

    def init(self, layout: Layout) -> State:
        return {"sum": FlatBuffer(torch.zeros(layout.numel), layout)}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        state["sum"].data.add_(x)
        return (yield from super().aggregate(x, state, context))


@breaks("test_a_non_finite_value_reaches_every_rank_wherever_it_was")
class HidesNaN(Mean):
    """Replace what is not finite, and say that nothing needs to be watched."""

    propagates_nonfinite = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return (yield from super().aggregate(x.nan_to_num(0, 0, 0), state, context))


@breaks("test_a_non_finite_value_reaches_every_rank_wherever_it_was")
class HidesNaNFromTheSum(Mean):
    """Replace what is not finite, and say that the sum will show it."""

    sums_nonfinite = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return (yield from super().aggregate(x.nan_to_num(0, 0, 0), state, context))


@breaks("test_every_finite_magnitude_stays_finite")
class SquaresOverflow(Mean):
    """Pass through the square root of the square."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        rooted = x.square().sqrt() * x.sign()
        result = yield from super().aggregate(rooted, state, context)
        return replace(result, contribution=lambda: rooted)


@breaks("test_buckets_cut_otherwise_change_no_value")
class NoiseByPlaceInTheBucket(Mean):
    """Draw for the flat buffer as a whole: another bucket, other noise."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        noisy = x * (1 + torch.rand(x.numel(), generator=context.private.generator()))
        result = yield from super().aggregate(noisy, state, context)
        return replace(result, contribution=lambda: noisy)


MEMORY: dict[int, Tensor] = {}


@breaks("test_a_step_with_a_nan_leaves_no_trace_once_its_state_is_dropped")
class RemembersOutsideItsState(Mean):
    """Keep momentum in a global variable."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        old = MEMORY.get(context.rank)
        mixed = x + 0.5 * old if old is not None and old.numel() == x.numel() else x.clone()
        MEMORY[context.rank] = mixed
        result = yield from super().aggregate(mixed, state, context)
        return replace(result, contribution=lambda: mixed)


@breaks("test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit")
class StateUnderAChangingName(Mean):
    """Name the leaf of the state after the step, so that a fresh state has no place for it."""

    def init(self, layout: Layout) -> State:
        return {"sum0": FlatBuffer(torch.zeros(layout.numel), layout)}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        ((_, old),) = state.items()
        mixed = x + 0.5 * old.data
        result = yield from super().aggregate(mixed, state, context)
        after = {f"sum{context.step + 1}": FlatBuffer(mixed, context.layout)}
        return AggregateResult(result.estimate, lambda: mixed, after)


@dataclass(frozen=True)
class Truncating(Quantize):
    """``C(x)`` rounds to nearest and claims to be unbiased. Some bytes."""

    bits: int = 3
    rounding: str = "nearest"
    unbiased = True


@breaks("test_the_estimates_of_an_unbiased_method_scatter_around_the_mean", biased=False, summable=False)
class BiasedInDisguise(AllGatherMean):
    """Round to nearest and claim to be unbiased."""

    def __init__(self) -> None:
        object.__setattr__(self, "compressor", Truncating())


@breaks("test_what_is_unbiased_and_not_exact_is_random_and_anew_in_each_step", biased=False, summable=False)
class TheSameNoiseEveryStep(AllGatherMean):
    """Fold no step into the key."""

    def __init__(self) -> None:
        object.__setattr__(self, "compressor", Quantize(3))

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return (yield from super().aggregate(x, state, replace(context, shared=Key.of("always"))))


@breaks("test_what_was_sent_and_what_is_owed_is_what_came_in", summable=False)
class LeakyFeedback(ErrorFeedback):
    """Forget a tenth of what is owed."""

    def __init__(self) -> None:
        object.__setattr__(self, "inner", AllGatherMean(Quantize(1)))

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        result = yield from super().aggregate(x, state, context)
        left = result.state["residual"]
        return replace(result, state={**result.state, "residual": FlatBuffer(0.9 * left.data, left.layout)})


@breaks("test_a_convex_problem_is_solved", summable=False)
class ForgetsItsDebt(ErrorFeedback):
    """One bit, and what is owed is dropped."""

    def __init__(self) -> None:
        object.__setattr__(self, "inner", AllGatherMean(Quantize(1)))

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        result = yield from super().aggregate(x, state, context)
        return replace(result, state=state)


@breaks("test_replicas_are_identical_after_200_steps_and_have_learnt")
class Stalls(Mean):
    """Every estimate is nothing."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        total = yield AllReduce(0 * x)
        return AggregateResult(total, lambda: torch.zeros_like(x), state)


@breaks("test_what_an_entry_claims_fits_its_method")
class NotSummable(AllGatherMean):
    """Claim to ride an all-reduce and gather."""

    def __init__(self) -> None:
        object.__setattr__(self, "compressor", Identity())


@breaks("test_an_entry_says_what_the_tables_need")
class Lawless(Mean):
    """no sentence"""


def faulty(test: str) -> Callable[[type], type]:
    """Export a class of compressors as one that ``test`` must find."""

    def enter(kind: type) -> type:
        compressors.__all__.append(kind.__name__)
        setattr(compressors, kind.__name__, kind)
        BROKEN[kind.__name__] = test
        return kind

    return enter


compressors.__all__[:] = []  # what the tests walk; they may import the sound ones all the same


@faulty("test_sizes_are_known_from_the_layout_alone")
@dataclass(frozen=True)
class SizedByValues(Compressor):
    """``C(x)`` is x without its zeros. Some bytes."""

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", torch.float32, layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty((Part("values", torch.float32, int(x.count_nonzero())),))
        payload["values"].copy_(x[x != 0])
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        out.zero_()[: payload["values"].numel()] = payload["values"]


class Plain(Identity):
    """``C(x)`` = x in some bytes; the others differ from it in one thing."""


@faulty("test_encoding_is_a_pure_function_of_slab_and_key")
class ChangesX(Plain):
    """``C(x)`` = x in some bytes, and x is gone."""

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = super().encode(x, layout, key)
        x.zero_()
        return payload


@faulty("test_adding_while_decoding_is_decoding_and_adding")
class NeverAdds(Plain):
    """``C(x)`` = x in some bytes."""

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        super().decode_into(out, payload, layout)


@faulty("test_cut_at_its_grain_a_slab_comes_back_the_same")
class CutAnywhere(Quantize):
    """``C(x)`` in blocks, some bytes, that may not be cut at 8 as it claims."""

    alignment = 8


@faulty("test_the_declared_omega_or_delta_holds")
class Boastful(Quantize):
    """``C(x)`` with an omega that is too good. Some bytes."""

    def omega(self, numel: int) -> float | None:
        return 1e-3

    def delta(self, numel: int) -> float | None:
        return None


@faulty("test_the_declared_omega_or_delta_holds")
class Shrinking(Plain):
    """``C(x)`` = x/2 in some bytes, with a delta that is too good."""

    unbiased = False

    def omega(self, numel: int) -> float | None:
        return None

    def delta(self, numel: int) -> float | None:
        return 0.9

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        out.add_(payload["values"] / 2) if add else out.copy_(payload["values"] / 2)


@faulty("test_payloads_that_may_be_added_decode_to_the_sum")
class NotLinear(Plain):
    """``C(x)`` = x by way of its cube. Some bytes."""

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        return super().encode(x**3, layout, key)

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        values = payload["values"]
        root = values.abs() ** (1 / 3) * values.sign()
        out.add_(root) if add else out.copy_(root)


@faulty("test_the_mean_of_many_draws_of_an_unbiased_one_is_the_slab")
class Leaning(Quantize):
    """``C(x)`` + 1/10 of x: a bias. Some bytes."""

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        return super().encode(x * 1.1, layout, key)


@faulty("test_what_is_unbiased_and_not_exact_depends_on_the_key")
class OneKey(Quantize):
    """``C(x)`` with the same noise for ever. Some bytes."""

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        return super().encode(x, layout, Key.of(1))


@faulty("test_each_parameter_comes_back_the_same_in_any_company")
class ByFirstName(Quantize):
    """``C(x)`` with noise that hangs on what comes first. Some bytes."""

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        return super().encode(x, layout, key.fold(layout.names[0] if layout.names else ""))


@faulty("test_zeros_come_back_as_zeros")
class Lifted(Plain):
    """``C(x)`` = x + 1. Some bytes."""

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        return super().encode(x + 1, layout, key)


@faulty("test_the_docstring_says_what_it_computes_and_weighs_and_refuses")
class Silent(Plain):
    """Nothing is said."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each mutant is run on the test that must find it, and on no other; the sound toy on all."""
    Path(os.environ["MUTANTS"]).write_text(json.dumps(BROKEN))
    wanted = [("averaging_toy", "test"), *BROKEN.items()]
    items[:] = [
        item for item in items if any(who in item.name and item.name.startswith(t) for who, t in wanted)
    ]
