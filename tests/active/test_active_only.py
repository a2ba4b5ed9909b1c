"""Laws in lock-step: whatever is active when, what came in is what was sent and what is owed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distcomp
from distcomp.active import ActiveParameters, ActiveSet, Frozen, Intersection, Planned
from distcomp.advice.profile import _Echo
from distcomp.attaching.observed import pruners_of
from distcomp.attaching.slices import slices_of
from distcomp.compressors import Quantize, TopK
from distcomp.errors import DistcompError, Mismatch
from distcomp.layout import Layout
from distcomp.methods import METHODS, ActiveOnly, ErrorFeedback, StepContext, from_compressor
from distcomp.methods.active_only import UNUSED_HERE, UsedOnly
from distcomp.methods.powersgd import PowerSGD
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Channel
from distcomp.runtime.ledger import Ledger
from distcomp.runtime.pipeline import Drive
from tests.buffers import ORDINARY, alike, draw, tensors
from tests.lockstep import converse

SPECS = [name for name, entry in METHODS.items() if entry.kind == "gradient" and not entry.control]
NAMES = ORDINARY.names
WITH_RESIDUALS = {
    "sign": lambda: ErrorFeedback(from_compressor(Quantize(bits=1))),
    "topk": lambda: ErrorFeedback(from_compressor(TopK(0.1))),
    "powersgd": lambda: distcomp.powersgd(rank=1),
    "choice": lambda: distcomp.qsgd(bits=1, pattern="reduce_scatter"),
}


@dataclass(frozen=True)
class Listed(ActiveParameters):
    """What a list says, step by step: for each parameter nothing, every other element, or all of it."""

    steps: tuple[tuple[int, ...], ...]
    keeps_dense_grad: bool = False

    def active(self, layout, context):
        kinds = dict(zip(NAMES, self.steps[context.step % len(self.steps)], strict=True))
        masks = {}
        for param in layout.slices:
            odd = (torch.arange(param.numel) % 2 == 1).view(param.shape)
            masks[param.name] = (False, odd, True)[kinds[param.name]]
        return ActiveSet.of(layout, masks)


some_steps = st.lists(st.tuples(*[st.integers(0, 2) for _ in NAMES]).map(tuple), min_size=1, max_size=6).map(
    tuple
)


def owed_in(states, *kinds):
    total = torch.zeros(ORDINARY.numel, dtype=torch.float64)
    for state in states:
        for name, leaf in tensors(state).items():
            path = name.split("/")
            if path[-1] in kinds:
                for param, piece in ORDINARY.pieces(total):
                    if param.name == path[0]:
                        piece.add_(leaf.double())
    return total


@pytest.mark.parametrize("residuals", ["keep", "drop"])
@pytest.mark.parametrize("kind", WITH_RESIDUALS)
@settings(max_examples=12)
@given(steps=some_steps, holds=st.booleans(), size=st.integers(1, 3))
def test_what_came_in_is_what_was_sent_held_owed_and_dropped(kind, residuals, steps, holds, size):
    source = Listed(steps, holds)
    method = ActiveOnly(WITH_RESIDUALS[kind](), source, residuals)
    states = [method.init(ORDINARY) for _ in range(size)]
    came = sent = torch.zeros(ORDINARY.numel, dtype=torch.float64)
    for step in range(7):
        active = source.active(ORDINARY, Planned(step))
        xs = draw(size, seed=step)
        round_ = converse(method, xs, states, step=step)
        states = round_.states
        if not holds:  # what is inactive has no gradient
            xs = [active.spread(active.pick(x)) for x in xs]
        came = came + torch.stack(xs).double().sum(0)
        sent = sent + torch.stack(round_.contributions()).double().sum(0)
        assert (active.complement(round_.estimate) == 0).all()
        torch.testing.assert_close(
            torch.stack(round_.contributions()).double().sum(0),
            size * round_.estimate.double(),
            rtol=1e-3,
            atol=1e-4,
        )
    residual = owed_in(states, "held", "residual", "dropped")
    torch.testing.assert_close(came, sent + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", WITH_RESIDUALS)
@settings(max_examples=12)
@given(steps=some_steps)
def test_what_is_inactive_keeps_its_state_bit_for_bit(kind, steps):
    source = Listed(steps)
    method = ActiveOnly(WITH_RESIDUALS[kind](), source)
    states = [method.init(ORDINARY) for _ in range(2)]
    for step in range(5):
        active = source.active(ORDINARY, Planned(step))
        before, states = states, converse(method, draw(2, seed=step), states, step=step).states
        old, new = tensors(before[0]), tensors(states[0])
        for name in old:
            parameter, *_ = name.split("/")
            if parameter not in active.elements:
                assert torch.equal(old[name], new[name])
            elif name.endswith("residual") and active.elements[parameter][1] is not None:
                assert torch.equal(old[name][::2], new[name][::2])


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_sends_less_and_a_parameter_that_returns_finds_its_state(spec):
    inner = distcomp.parse(spec)
    everything, weightless = (2, 2, 2, 2), (0, 2, 2, 2)
    method = ActiveOnly(inner, Listed((everything, weightless, everything)), compare=False)
    states, others = ([each.init(ORDINARY) for _ in range(2)] for each in (method, inner))
    first, its = (converse(m, draw(2), s) for m, s in ((method, states), (inner, others)))
    assert torch.equal(first.estimate, its.estimate)
    without = converse(method, draw(2, seed=1), first.states, step=1)
    assert sum(without.sent_bytes) < sum(first.sent_bytes) or spec == "warmup"
    kept = {n: v for n, v in tensors(first.states[0]).items() if n.startswith("fc.weight/")}
    waiting = {n: v for n, v in tensors(without.states[0]).items() if n.startswith("fc.weight/")}
    assert kept.keys() == waiting.keys()
    assert all(torch.equal(kept[name], waiting[name]) for name in kept)
    assert torch.isfinite(converse(method, draw(2, seed=2), without.states, step=2).estimate).all()


def test_where_nothing_is_active_nothing_is_sent():
    method = ActiveOnly(
        ErrorFeedback(from_compressor(Quantize(bits=1))), Listed(((0, 0, 0, 0),)), compare=False
    )
    states = [method.init(ORDINARY)] * 2
    round_ = converse(method, draw(2), states)
    assert round_.sent_bytes == [0, 0]
    assert (round_.estimate == 0).all()
    assert alike(round_.states[0], states[0])
    assert method.payload_bytes(ORDINARY, 2, 0) == 0


def test_sources_compose():
    odd, some = Listed(((1, 2, 1, 2),)), Listed(((2, 0, 1, 2),))
    both = Intersection((odd, some)).active(ORDINARY, Planned())
    x = draw(1)[0]
    expected = odd.active(ORDINARY, Planned()).spread(odd.active(ORDINARY, Planned()).pick(x))
    expected = some.active(ORDINARY, Planned()).spread(some.active(ORDINARY, Planned()).pick(expected))
    assert torch.equal(both.spread(both.pick(x)), expected)
    assert both.layout.names == ("fc.weight", "conv.weight", "norm.weight")
    assert torch.equal(both.put(x, both.pick(x)), x)
    assert torch.equal(both.complement(x), x - expected)
    assert Intersection((Listed((), True), some)).keeps_dense_grad
    assert not Intersection((odd, some)).keeps_dense_grad


def test_a_frozen_parameter_is_what_the_loop_has_seen():
    method = ActiveOnly(ErrorFeedback(from_compressor(Quantize(bits=1))), Frozen())
    states = [method.init(ORDINARY)] * 2
    first = converse(method, draw(2), states)
    frozen = {"frozen": frozenset({"fc.weight"})}
    second = converse(method, draw(2, seed=1), first.states, step=1, observed=frozen)
    at = slice(0, 40 * 37)
    assert (first.estimate[at] != 0).any()
    assert (second.estimate[at] == 0).all()
    assert torch.equal(
        tensors(first.states[0])["fc.weight/inner/residual"],
        tensors(second.states[0])["fc.weight/inner/residual"],
    )


def test_who_differs_is_named_on_every_rank():
    method = ActiveOnly(from_compressor(Quantize()), Frozen())
    seen = [{"frozen": frozenset(names)} for names in ((), (), ("fc.bias",))]
    with pytest.raises(Mismatch, match="of rank 2 differ from those of rank 0 in step 4"):
        converse(method, draw(3), [method.init(ORDINARY)] * 3, step=4, observed=seen)


class Asked(_Echo):
    """What was asked of the network, in order."""

    def __init__(self):
        super().__init__(0, 2)
        self.kinds = []

    def start(self, request):
        self.kinds.append(type(request).__name__)
        self.exchange = len(self.kinds)
        return super().start(request)


def test_what_is_compared_is_followed_at_once():
    """A bucket goes out while backward goes on, and does not wait until the next one is ready."""
    asked, method = Asked(), ActiveOnly(distcomp.parse("identity"), Frozen())
    drive = Drive(Channel(asked, 0, Ledger()))
    context = StepContext(0, 2, ORDINARY, 0, Key.of(0))
    drive.add(Aggregation(method, draw(1)[0], method.init(ORDINARY), context))
    assert asked.kinds == ["Compared", "AllReduce"]
    drive.add(Aggregation(method, draw(1)[0], method.init(ORDINARY), context))
    drive.end()
    assert asked.kinds == ["Compared", "AllReduce"] * 2


@settings(max_examples=12)
@given(
    unused=st.lists(st.tuples(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES))), max_size=5)
)
def test_what_no_rank_used_stays_as_it_was(unused):
    inner = ErrorFeedback(PowerSGD(1))
    method = UsedOnly(inner)
    states, plain = ([each.init(ORDINARY) for _ in range(2)] for each in (method, inner))
    for step, each in enumerate(unused):
        seen = [{UNUSED_HERE: frozenset(names)} for names in each]
        nobody = each[0] & each[1]
        xs = draw(2, seed=step)
        before, round_ = states, converse(method, xs, states, step=step, observed=seen)
        states = round_.states
        old, new = tensors(before[0]), tensors(states[0])
        assert list(old) == list(new)
        for param, piece in ORDINARY.pieces(round_.estimate):
            assert (piece == 0).all() == (param.name in nobody)
        assert all(torch.equal(old[n], new[n]) for n in old if n.split("/")[0] in nobody)
    full = [{UNUSED_HERE: frozenset()}] * 2
    xs = draw(2, seed=99)
    after = converse(method, xs, states, step=9, observed=full)
    same = converse(inner, xs, states, step=9)
    assert torch.equal(after.estimate, same.estimate)
    assert alike(after.states[0], same.states[0])
    assert alike(method.init(ORDINARY), plain[0])


def test_a_copied_method_answers_alike():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    pruner = distcomp.pruning.fixed(model, {"0.weight": torch.rand(4, 6) < 0.5})
    method = distcomp.masked(pruner, "qsgd:bits=1")
    twin = copy.deepcopy(method)
    assert repr(twin) == repr(method)
    before = method.source.active(weights_of(model), Planned())
    pruner.pruned["0.weight"].mask.fill_(True)  # what lives changes, what was handed over does not
    seen = {pruner.name: pruner.snapshot()}
    handed = StepContext(0, 1, weights_of(model), 0, Key.of(0), observed=seen)
    for each in (method, twin):
        assert each.source.active(weights_of(model), Planned()).digest == before.digest
        assert each.source.active(weights_of(model), handed).indices is None


def weights_of(model):
    return Layout(tuple(slices_of(model).values()))


def test_a_method_whose_pruner_is_elsewhere_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    pruner = distcomp.pruning.fixed(model, {"0.weight": torch.rand(4, 6) < 0.5})
    source = pruner.active_parameters()
    moved = type(source)("pruner of another process", source.initial)
    with pytest.raises(DistcompError, match="not in this process"):
        pruners_of(distcomp.averaging.active_only("identity", moved))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(DistcompError, match=r"fc.bias is torch.bool \[3\] .* shape \[37\]"):
        ActiveSet.of(ORDINARY, {"fc.bias": torch.ones(3, dtype=torch.bool)})
