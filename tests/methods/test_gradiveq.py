"""GradiVeQ against its equations in NumPy, its equalities, its cycle, and what its subspaces are worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.errors import DistcompError
from distcomp.kernels.subspace import Known, Sliced, project_slices, restore
from distcomp.layout import Layout, ParamSlice
from distcomp.methods import (
    Cycle,
    ErrorFeedback,
    GradiVeQ,
    Method,
    Slicing,
    Subspace,
    gradiveq,
    identity,
    parse,
)
from distcomp.methods.base import cut_state, join_state
from distcomp.methods.slices import mixed, principal, sampled
from tests.buffers import alike, by_name, draw
from tests.lockstep import Round, converse

NET = Layout.of([("one", (4, 3, 3, 3)), ("two", (6, 4, 3, 3))])
SHORT = Cycle(learn=10, compressed=6, retrain=0)


def gradients(
    step: int, size: int = 3, layout: Layout = NET, spread: int = 3, kind: int = 0
) -> list[torch.Tensor]:
    """Gradients that lie near a subspace of ``spread`` directions, as those of convolutions do."""
    fixed = torch.Generator().manual_seed(kind)
    directions = torch.randn(spread + 1, layout.numel, generator=fixed)
    fresh = torch.Generator().manual_seed(1 + 1000 * step)
    weights = torch.randn(size, spread + 1, generator=fresh).sign()
    weights[:, 0] = 0.5  # a mean that is not zero
    noise = 0.05 * torch.randn(size, layout.numel, generator=fresh)
    return list(weights @ directions + noise)


def directions(samples: torch.Tensor, most: int) -> torch.Tensor:
    return torch.bmm(principal(torch.bmm(samples, samples.mT), most), samples)


def run(method: Method, steps: int, layout: Layout = NET, size: int = 3) -> list[Round]:
    states, rounds = [method.init(layout)] * size, []
    for step in range(steps):
        rounds.append(converse(method, gradients(step, size, layout), states, layout, step))
        states = rounds[-1].states
    return rounds


def check_law(round_: Round) -> None:
    gap = sum(round_.contributions()) - len(round_.results) * round_.estimate
    largest = float(torch.stack(round_.contributions()).abs().sum(0).max())
    assert float(gap.abs().max()) <= max(2e-5, 10 * round_.rounding) * largest
    assert all(torch.equal(estimate, round_.estimate) for estimate in round_.estimates)


def paper_slices(x: torch.Tensor, name: str, k: int, layout: Layout = NET) -> np.ndarray:
    """Filters fastest, then depth, then width, then height; cut into slices of K."""
    (param, piece) = next((s, p) for s, p in layout.pieces(x) if s.name == name)
    return piece.view(param.shape).double().numpy().transpose(2, 3, 1, 0).reshape(-1, k)


def paper_cycle(means: list[np.ndarray], loss: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """From the slices of each learning step, one of them a step in its turn: U (rows) and the means, with d
    chosen on the last fifth."""
    mu = np.mean(means, axis=0)
    samples = np.stack([(slices - mu)[step % len(mu)] for step, slices in enumerate(means)])
    split = len(samples) - len(samples) // 5
    early, late = samples[:split], samples[split:]
    directions = np.linalg.svd(early)[2][:most]
    losses = [
        np.linalg.norm(late @ (np.eye(late.shape[1]) - directions[:d].T @ directions[:d])) ** 2
        for d in range(1, most + 1)
    ]
    allowed = losses[-1] + loss * np.linalg.norm(late) ** 2
    d = 1 + next(i for i, one in enumerate(losses) if one <= allowed)
    return np.linalg.svd(samples)[2][:d], mu


@pytest.mark.parametrize(("name", "k"), [("one", 36), ("two", 24)])
def test_it_is_the_papers_algorithm(name: str, k: int) -> None:
    method = GradiVeQ(Slicing(aim=36), Subspace(ratio=4, bits=32), SHORT, plain=identity())
    rounds = run(method, 16)
    means = [torch.stack(gradients(step)).mean(0) for step in range(16)]
    u, mu = paper_cycle([paper_slices(mean, name, k) for mean in means[:10]], 0.01, min(k // 4, 7))
    assert len(u) == int(rounds[9].states[0]["dims"][name])
    for step in range(16):
        expected = paper_slices(means[step], name, k)
        if step >= 10:
            expected = (expected - mu) @ u.T @ u + mu
        found = paper_slices(rounds[step].estimate, name, k)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        check_law(rounds[step])


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(0, 10**6))
def test_what_the_parts_compress_to_adds_up_to_what_the_sum_compresses_to(
    size: int, slices: int, bases: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = Known((Sliced(0, 4, slices, 3, min(bases, slices), 4, 3),))
    parts = torch.randn(size, known.end, generator=generator)
    basis = torch.randn(min(bases, slices), 4, 12, generator=generator).bfloat16()
    offset = torch.randn(slices, 4, generator=generator)
    summed = sum(project_slices(part, [basis], [offset / size], known) for part in parts)
    whole = project_slices(parts.sum(0), [basis], [offset], known)
    torch.testing.assert_close(summed, whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mean", ["pca", "zero"])
def test_with_as_many_coefficients_as_elements_it_is_the_exact_mean(mean: str) -> None:
    layout = Layout.of([("w", (2, 3, 3, 3))])
    everything = Subspace(ratio=1, loss=0, centred=mean == "pca", bits=32)
    method = GradiVeQ(Slicing(aim=6), everything, Cycle(12, 6, 0), plain=identity())
    for step, round_ in enumerate(run(method, 18, layout)):
        exact = torch.stack(gradients(step, layout=layout)).mean(0)
        torch.testing.assert_close(round_.estimate, exact, atol=2e-5, rtol=1e-4)
        if step == 17:
            assert int(round_.states[0]["dims"]["w"]) == 6


@pytest.mark.parametrize(("reuse", "bases"), [(0, 1), (1, 9), (2, 5), (4, 3)])
def test_slices_share_bases_as_they_are_told(reuse: int, bases: int) -> None:
    slicing = Slicing(aim=24, reuse=reuse)
    method = GradiVeQ(slicing, Subspace(ratio=4, bits=32), SHORT, plain=identity())
    rounds = run(method, 14)
    state = rounds[-1].states[0]
    found = in_papers_order(state["basis"]["two"], (6, 4, 3, 3))
    assert found.shape == (bases, 6, 24)
    for basis in found:
        torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    for step in range(10, 14):
        check_law(rounds[step])
    learnt = [paper_slices(torch.stack(gradients(step)).mean(0), "two", 24) for step in range(10)]
    dims, share, mu = int(state["dims"]["two"]), -(-9 // bases), np.mean(learnt, axis=0)
    slices = paper_slices(torch.stack(gradients(13)).mean(0), "two", 24)
    estimate = paper_slices(rounds[13].estimate, "two", 24)
    for base in range(bases):  # each from its own slices in turn
        own = list(range(base * share, min(9, (base + 1) * share)))
        first = np.stack(
            [learnt[step][own[step % len(own)]] - mu[own[step % len(own)]] for step in range(10)]
        )
        u = np.linalg.svd(first)[2][:dims]
        used = found[base, :dims].numpy()
        np.testing.assert_allclose(used.T @ used, u.T @ u, atol=1e-3)
        for m in own:
            np.testing.assert_allclose(estimate[m], (slices[m] - mu[m]) @ u.T @ u + mu[m], atol=1e-3)


def in_papers_order(basis: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``[B, most, K]`` with filters fastest, then depth, then places."""
    filters, depth = shape[:2]
    cut = basis.double().view(*basis.shape[:2], filters, depth, -1)
    return cut.permute(0, 1, 4, 3, 2).flatten(2)


@pytest.mark.parametrize("along", ["filter", "place"])
def test_a_basis_of_half_the_bits_is_as_good_as_the_papers(along: str) -> None:
    """U is rounded to 8 bits of mantissa, and all else is float32: the estimate is that of the rounded U."""
    method = GradiVeQ(Slicing(aim=36, along=along), Subspace(ratio=4), SHORT, plain=identity())
    rounds = run(method, 16)
    state = rounds[9].states[0]
    means = [torch.stack(gradients(step)).mean(0) for step in range(16)]
    mu = torch.stack(means[:10]).mean(0)
    torch.testing.assert_close(state["mean"].data, mu, atol=1e-6, rtol=1e-5)
    for step in range(10, 16):
        check_law(rounds[step])
        for param, at in zip(NET.slices, NET.offsets, strict=True):
            most, dims = state["basis"][param.name].shape[1], int(state["dims"][param.name])
            one = method.slicing.sliced(param, at, most, dims)
            u = state["basis"][param.name][0, :dims].double().numpy()
            assert np.abs(u @ u.T - np.eye(dims)).max() < 0.02
            g = one.view(means[step] - mu).reshape(one.slices, one.k).double().numpy()
            expected = torch.from_numpy(g @ u.T @ u).float().view(one.slices, one.units, one.run)
            found = one.view(rounds[step].estimate)
            torch.testing.assert_close(found, expected + one.view(mu), atol=2e-5, rtol=1e-4)


def test_a_filter_is_a_slice_of_its_own() -> None:
    """K = D H W for filters of several places; a 1 x 1 convolution is sliced as in the paper."""
    slicing = Slicing(along="filter")

    def cut(*shape: int) -> tuple[int, int, int]:
        one = slicing.sliced(Layout.of([("w", shape)]).slices[0], 0, 1, 1)
        return one.units, one.slices, one.run

    assert cut(16, 8, 3, 3) == (1, 16, 72)
    assert cut(64, 32, 1, 1) == (2048, 1, 1)
    flat = torch.arange(2 * 3 * 9.0)
    one = slicing.sliced(Layout.of([("w", (2, 3, 3, 3))]).slices[0], 0, 1, 1)
    assert torch.equal(one.view(flat)[1].reshape(-1), flat.view(2, 27)[1])
    assert [sampled(one, age) for age in range(3)] == [[0], [1], [0]]


def test_the_means_are_dropped_or_kept_for_what_lies_outside() -> None:
    """A rank-one residual direction: with the mean it stays at its mean, without it goes to zero."""
    estimates = {}
    for mean in ("pca", "zero"):
        method = GradiVeQ(Slicing(aim=24), Subspace(4, centred=mean == "pca"), SHORT, plain=identity())
        state = run(method, 10)[-1].states
        silent = [torch.zeros(NET.numel)] * 3
        estimates[mean] = converse(method, silent, state, NET, 10).estimate
    assert float(estimates["pca"].norm()) > 1.0
    assert not estimates["zero"].any()


def test_the_bytes_of_every_step_are_those_declared() -> None:
    method = parse("gradiveq:ratio=4,loss=0,learn=5,compressed=3")
    layout = Layout.of([*[(s.name, s.shape) for s in NET.slices], ("fc", (9, 5)), ("bias", (7,))])
    states = [method.init(layout)] * 4
    for step in range(18):
        round_ = converse(method, draw(4, layout, seed=step), states, layout, step)
        states = round_.states
        assert sum(round_.sent_bytes) / 4 == pytest.approx(method.payload_bytes(layout, 4, step), abs=8), step


def test_a_run_resumed_anywhere_in_a_cycle_repeats_itself_bit_for_bit() -> None:
    method = gradiveq(ratio=4, learn=6, compressed=5, retrain=1.2)
    straight = run(method, 26)
    for stop in (3, 5, 6, 9, 11, 14):
        states = [
            join_state(
                {n: {p: v.clone() for p, v in leaf.items()} for n, leaf in cut_state(s).items()},
                method.init(NET),
            )
            for s in straight[stop - 1].states
        ]
        for step in range(stop, 26):
            round_ = converse(method, gradients(step), states, NET, step)
            states = round_.states
            assert torch.equal(round_.estimate, straight[step].estimate), (stop, step)
        assert all(alike(a, b) for a, b in zip(states, straight[-1].states, strict=True))


@pytest.mark.parametrize("bits", [32, 16, 4])
@pytest.mark.parametrize(("turned", "learns_anew"), [(3, True), (2, True), (1, False)])
def test_it_learns_anew_when_most_ranks_see_their_loss_grow(
    bits: int, turned: int, learns_anew: bool
) -> None:
    """After ten compressed steps some ranks' gradients leave the subspace for another."""
    sent = gradiveq(coefficient_bits=bits).coefficients
    method = GradiVeQ(Slicing(along="place"), Subspace(4), Cycle(10, 60), identity(), sent)
    states = [method.init(NET)] * 3
    for step in range(40):
        xs = gradients(step)
        if step >= 30:
            xs[:turned] = gradients(step, kind=1)[:turned]
        round_ = converse(method, xs, states, NET, step)
        states = round_.states
        check_law(round_)
        ages = [int(states[rank]["age"]["one"]) for rank in range(3)]
        assert len(set(ages)) == 1
        assert ages[0] == (step - 30 if learns_anew and step >= 30 else step + 1) % 70


def test_layers_may_be_at_different_points_of_their_cycles() -> None:
    """Each layer then does what it does alone."""
    method = GradiVeQ(Slicing(aim=36), Subspace(4), Cycle(10, 6, 1.5), plain=identity())
    alone = {name: NET.select(lambda param, name=name: param.name == name) for name in NET.names}
    ahead = {"one": 0, "two": 4}
    single = {name: [method.init(layout)] * 3 for name, layout in alone.items()}

    def one_step(name: str, step: int) -> torch.Tensor:
        xs = [by_name(x, NET)[name] for x in gradients(step)]
        round_ = converse(method, xs, single[name], alone[name], step)
        single[name] = round_.states
        return round_.estimate

    for step in range(ahead["two"]):
        one_step("two", step)
    joined = [
        join_state({**cut_state(a), **cut_state(b)}, method.init(NET))
        for a, b in zip(single["one"], single["two"], strict=True)
    ]
    for step in range(4, 30):
        round_ = converse(method, gradients(step), joined, NET, step)
        joined = round_.states
        check_law(round_)
        for name, found in by_name(round_.estimate, NET).items():
            assert torch.equal(found, one_step(name, step)), (name, step)


def test_a_nan_at_the_end_of_learning_breaks_nothing() -> None:
    method = gradiveq(ratio=4, learn=6, compressed=4)
    before = run(method, 5)[-1].states
    xs = gradients(5)
    xs[2][7] = torch.nan
    assert converse(method, xs, before, NET, 5).estimate.isnan().any()
    assert converse(method, gradients(6), before, NET, 6).estimate.isfinite().all()


def test_error_feedback_owes_what_lies_outside_the_subspace() -> None:
    method = gradiveq(ratio=4, learn=6, compressed=6, error_feedback=True)
    rounds = run(method, 24)
    sent = sum(3 * round_.estimate for round_ in rounds)
    residual = sum(state["residual"].data for state in rounds[-1].states)
    came = sum(sum(gradients(step)) for step in range(24))
    assert isinstance(method, ErrorFeedback)
    torch.testing.assert_close(sent + residual, came, atol=1e-3, rtol=1e-4)
    assert float(residual.norm()) > 0.1


def test_slices_are_long_but_no_longer_than_they_should_be() -> None:
    def length(*shape: int) -> int | None:
        return Slicing().length(Layout.of([("w", shape)]).slices[0])

    assert length(16, 16, 3, 3) == 768  # the paper's example: three slices
    assert length(32, 16, 3, 3) == 512
    assert length(64, 64, 3, 3) == 4096
    assert length(128, 64, 3, 3) is None
    assert length(16, 3, 3, 3) == 432
    assert length(10, 64) is None


def test_others_go_their_own_way() -> None:
    layout = Layout.of([("wide", (8, 512, 3, 3)), ("conv", (4, 3, 3, 3)), ("fc", (30, 20))])
    exact = converse(gradiveq(learn=5), draw(2, layout), [gradiveq(learn=5).init(layout)] * 2, layout)
    mean = torch.stack(draw(2, layout)).mean(0)
    for name, found in by_name(exact.estimate, layout).items():
        assert torch.equal(found, by_name(mean, layout)[name]) is (name != "conv")
    assert "powersgd" in str(gradiveq(others="powersgd:rank=2")).lower()


def test_what_it_cannot_do_is_refused() -> None:
    piece = Layout((ParamSlice("w", (8, 8, 3, 3), 0, 64),))
    for refused in (
        lambda: Cycle(4),
        lambda: Cycle(10, 0),
        lambda: Cycle(retrain=0.9),
        lambda: Subspace(ratio=0.5),
        lambda: Subspace(loss=1.0),
        lambda: Slicing(aim=9000),
        lambda: Slicing(reuse=-1),
        lambda: Slicing(along="depth"),
        lambda: Subspace(bits=8),
        lambda: gradiveq(plain_bits=1),
        lambda: gradiveq(mean="median"),
        lambda: GradiVeQ(coefficients=parse("qsgd:bits=1")),
        lambda: gradiveq().init(piece),
    ):
        with pytest.raises(DistcompError):
            refused()


class Net(torch.nn.Sequential):
    """A convolution of 16 to 16 channels between its input and its answer: 4 classes of 8 x 8 pictures."""

    def __init__(self) -> None:
        nn = torch.nn
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 4),
        )


def recorded(steps: int, workers: int = 4) -> list[torch.Tensor]:
    """The mean gradients, over workers in lock-step, of the inner convolution while the net trains."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Net()
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    found = []
    for _ in range(steps):
        labels = torch.randint(4, (workers * 16,), generator=generator)
        pictures = patterns[labels] + 1.5 * torch.randn(workers * 16, 1, 8, 8, generator=generator)
        loss = torch.nn.functional.cross_entropy(net(pictures), labels)
        net.zero_grad()
        loss.backward()
        found.append(net[2].weight.grad.detach().clone().reshape(-1))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.05 * parameter.grad
    return found


def held_out_loss(
    grads: list[torch.Tensor], learn: int, basis: torch.Tensor | None = None
) -> tuple[float, int]:
    """The relative error of gradients after those that were learnt from, in the subspace (or another)."""
    known = Known((Sliced(0, 256, 3, 3, 1, 96, 96),))
    (one,) = known.each
    mean = torch.stack(grads[:learn]).mean(0)
    samples = torch.stack(
        [one.view(g - mean)[sampled(one, age)].reshape(1, 768) for age, g in enumerate(grads[:learn])], dim=1
    )
    mixture, dims = Subspace(ratio=8).find(samples)
    used = mixed(mixture, samples, 16) if basis is None else basis.bfloat16()
    cut = Known((Sliced(0, 256, 3, 3, 1, used.shape[1], dims),))
    nothing = [torch.zeros(3, used.shape[1])]
    back = torch.empty(len(grads) - learn, 2304)
    for g, out in zip(grads[learn:], back, strict=True):
        restore(project_slices(g - mean, [used], nothing, cut), [used], mean, out, cut)
    return float((back - torch.stack(grads[learn:])).norm() / torch.stack(grads[learn:]).norm()), dims


def test_subspaces_hold_gradients_to_come_better_than_noise_or_chance() -> None:
    """On gradients it was not found from: its own, independent noise in its place, and a random basis."""
    grads = recorded(90)
    noise = list(torch.randn(90, 2304, generator=torch.Generator().manual_seed(1)))
    seeded = torch.Generator().manual_seed(2)
    chance = directions(torch.randn(1, 200, 768, generator=seeded).double(), 96).float()
    own, dims = held_out_loss(grads, 60)
    assert own < 0.5
    assert held_out_loss(noise, 60)[0] > 0.9
    assert held_out_loss(grads, 60, chance)[0] > 1.5 * own
    assert dims < 48
