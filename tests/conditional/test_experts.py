"""The mixture of experts, against the paper's equations in NumPy, and spread over ranks against one
process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distcomp
from distcomp.conditional import MixtureOfExperts, NoisyTopKGate, balance_loss
from distcomp.conditional.expert_traffic import (
    MixtureShape,
    balance_call_bytes,
    bits_per_value,
    count_call_bytes,
    row_call_bytes,
)
from distcomp.conditional.gating import capacity_of, squared_variation
from tests.cluster import Cluster
from tests.conditional import expert_jobs as jobs

# ---------------------------------------------------------------------- the paper's equations, in NumPy


def softmax(values):
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def phi(value):
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def by_the_paper(x, clean_weights, noise_weights, epsilon, k):
    """Gates (zero where not chosen), importance and load of Shazeer et al., one token at a time."""
    tokens, experts = len(x), clean_weights.shape[1]
    gates, load = np.zeros((tokens, experts)), np.zeros(experts)
    for token in range(tokens):
        clean = x[token] @ clean_weights
        deviation = np.log1p(np.exp(x[token] @ noise_weights)) + 1e-2
        noisy = clean + epsilon[token] * deviation
        best = sorted(range(experts), key=lambda e: -noisy[e])[:k]
        gates[token, best] = softmax(noisy[best])
        for expert in range(experts):
            others = sorted((noisy[e] for e in range(experts) if e != expert), reverse=True)
            load[expert] += phi((clean[expert] - others[k - 1]) / deviation[expert])
    return gates, gates.sum(0), load


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_the_gate_is_the_papers(seed, k):
    generator = torch.Generator().manual_seed(seed)
    gate = NoisyTopKGate(5, 6, k)
    with torch.no_grad():
        gate.clean.copy_(torch.randn(5, 6, generator=generator))
        gate.noise.copy_(torch.randn(5, 6, generator=generator))
    x = torch.randn(7, 5, generator=generator)
    epsilon = torch.randn(7, 6, generator=generator)
    gate.draw = lambda tokens, like: epsilon
    gates = gate(x)
    wanted, importance, load = by_the_paper(
        x.double().numpy(), gate.clean.detach().double().numpy(), gate.noise.detach().double().numpy(),
        epsilon.double().numpy(), k,
    )  # fmt: skip
    dense = torch.zeros(7, 6).scatter(1, gates.chosen, gates.weights.detach())
    assert np.allclose(dense.numpy(), wanted, atol=1e-5)
    assert np.allclose(gates.importance.detach().numpy(), importance, atol=1e-4)
    assert np.allclose(gates.load.detach().numpy(), load, atol=1e-4)


def test_noise_is_of_the_tokens_and_evaluation_has_none():
    gate = NoisyTopKGate(4, 6, 2)
    x = torch.randn(50, 4)
    assert torch.equal(gate.draw(x, torch.empty(50, 6)), gate.draw(x.clone(), torch.empty(50, 6)))
    assert not torch.equal(gate.draw(x, torch.empty(50, 6)), gate.draw(x + 1, torch.empty(50, 6)))
    noise = gate.draw(torch.randn(4000, 4), torch.empty(4000, 6))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    gate.eval()
    assert torch.equal(gate(x).weights, torch.full((50, 2), 0.5))


def test_squared_variation():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert squared_variation(x).item() == pytest.approx(np.var([1, 2, 6], ddof=1) / 9)
    assert squared_variation(torch.ones(4)) == 0
    assert squared_variation(torch.ones(1)) == 0


def by_token(moe, x, chosen=None):
    """The mixture one token at a time."""
    gates = moe.gate(x)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for slot in range(moe.k):
            e = int(gates.chosen[token, slot])
            if chosen is None or (token, slot) in chosen:
                hidden = torch.relu(x[token] @ moe.up[e] + moe.up_bias[e])
                out[token] += gates.weights[token, slot] * (hidden @ moe.down[e] + moe.down_bias[e])
    return out


@pytest.mark.parametrize("kind", ["mixed", "lonely", "one"])
def test_grouped_products_are_those_of_each_token(kind):
    moe, x = jobs.mixture(kind), jobs.tokens_of(3)
    assert torch.allclose(moe(x), by_token(moe, x), atol=1e-6)
    assert sum(moe.routing.by_expert) == 2 * len(x)
    if kind == "one":
        assert moe.routing.by_expert[2] + moe.routing.by_expert[3] > 0
        assert 0 in moe.routing.by_expert
    shaped = moe(x.view(4, 4, -1))
    assert torch.equal(shaped.view(16, -1), moe(x))


def test_what_is_above_capacity_gets_nothing():
    moe, x = jobs.mixture("one", capacity=1.0), jobs.tokens_of(3)
    out = moe(x)
    most = capacity_of(1.0, 16, 2, 8)
    assert most == 4
    assert max(moe.routing.by_expert) == most
    chosen, taken = set(), dict.fromkeys(range(8), 0)
    for token, experts in enumerate(moe.gate(x).chosen.tolist()):
        for slot, e in enumerate(experts):
            if taken[e] < most:
                taken[e] += 1
                chosen.add((token, slot))
    assert moe.routing.dropped == 32 - len(chosen) > 0
    assert torch.allclose(out, by_token(moe, x, chosen), atol=1e-6)


def test_gradcheck_of_experts_and_losses():
    moe = MixtureOfExperts(3, 4, experts=4, k=2, importance_weight=0.3, load_weight=0.2).double()
    with torch.no_grad():
        moe.gate.clean.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    epsilon = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moe.gate.draw = lambda tokens, like: epsilon
    moe.gate.noise.data.fill_(0.1)

    def both(x, clean, up):
        out = torch.func.functional_call(moe, {"gate.clean": clean, "up": up}, (x,))
        return out.sin().sum()

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(both, (x, moe.gate.clean, moe.up))

    def balanced(clean):
        gates = torch.func.functional_call(moe.gate, {"clean": clean}, (x.detach(),))
        return squared_variation(gates.importance) + squared_variation(gates.load)

    assert torch.autograd.gradcheck(balanced, (moe.gate.clean,))


# ------------------------------------------------------------------------------------------ spread over ranks


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["mixed", "lonely", "one"])
def test_spread_experts_equal_one_process_bit_for_bit(cluster, size, kind):
    wanted = jobs.alone(size, kind)
    answers = cluster(size).run(jobs.spread, kind)
    assert torch.equal(torch.cat([each["out"] for each in answers]), wanted["out"])
    for each in answers:
        own = slice(each["own"][0], each["own"][-1] + 1)
        for name, gradient in each["experts"].items():
            assert torch.equal(gradient, wanted["experts"][name][own]), name
        assert torch.allclose(each["gate"], wanted["gate"], atol=1e-6)
    counts = [sum(row) for row in zip(*(each["counts"] for each in answers), strict=True)]
    assert tuple(counts) == wanted["counts"]
    if kind == "one":
        assert counts.count(0) > 0


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_ranks_with_many_few_and_no_tokens_and_experts_that_overflow(cluster, capacity):
    """Each rank is answered as a process with its tokens alone, and experts hear from all ranks."""
    answers = cluster(4).run(jobs.uneven, capacity)
    for each in answers:
        assert torch.allclose(each["spread"]["out"], each["alone"]["out"], atol=1e-6)
        assert torch.allclose(each["spread"]["x"], each["alone"]["x"], atol=1e-6)
        assert each["spread"]["dropped"] == each["alone"]["dropped"]
    assert answers[1]["spread"]["out"].shape == (0, jobs.WIDTH)
    assert (sum(each["spread"]["dropped"] for each in answers) > 0) == (capacity is not None)
    wanted = sum(each["alone"]["up"] for each in answers) / 4  # of the mean loss over the ranks
    for each in answers:
        own = slice(each["spread"]["own"][0], each["spread"]["own"][-1] + 1)
        assert torch.allclose(each["spread"]["up"], wanted[own], atol=1e-6)


def test_balance_is_over_all_ranks(cluster):
    for mine, wanted in cluster(2).run(jobs.gradients_of_the_balance):
        assert torch.allclose(mine, wanted, atol=1e-6)
        assert mine.abs().max() > 1e-4


@pytest.mark.parametrize("wire", ["identity", "qsgd:bits=8", "bf16", "mxfp8"])
def test_bytes_are_those_of_the_formula(cluster, wire):
    for size in (2, 4):
        for sent, due in cluster(size).run(jobs.counted, wire):
            assert sent == due


def test_what_ranks_tell_each_other_is_small_beside_rows():
    """A first layer's step of 128 tokens of 16 numbers, two experts each, half of them on the other rank:
    counts and what is compared, balance both ways, rows there, back, and their gradients back."""

    def of(codec):
        told = count_call_bytes(4, 2) + 2 * balance_call_bytes(8, 2)
        return told + 3 * row_call_bytes([128], 16, codec)

    headers = 6 * 32
    assert of("identity") == 3 * 128 * 16 * 4 + headers + 8 + 4 * 4 + 2 * 16 * 4
    assert of("mxfp8") < 0.53 * of("bf16")
    assert of("qsgd:bits=8") < 0.28 * of("identity")


def test_rows_of_few_bits_are_near_and_unbiased(cluster):
    wanted = jobs.alone(2, "mixed")
    for wire, most in (("qsgd:bits=8", 0.02), ("mxfp8", 0.08)):
        answers = cluster(2).run(jobs.spread, "mixed", wire)
        out = torch.cat([each["out"] for each in answers])
        error = (out - wanted["out"]).norm() / wanted["out"].norm()
        assert 1e-5 < error < most


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_the_rest_goes_by_any_wrapper(cluster, wrapper):
    assert max(cluster(2).run(jobs.composed, wrapper, "identity")) < 1e-5
    assert 1e-6 < max(cluster(2).run(jobs.composed, wrapper, "qsgd:bits=8")) < 0.1


def test_experts_on_several_ranks_are_reduced_over_those(cluster):
    assert max(cluster(4).run(jobs.composed, "ddp", "identity", 2)) < 1e-5
    for words in cluster(4).run(jobs.without_holders):
        assert "spread over 2 of 4 ranks are held by several" in words


def test_four_ranks_become_two_by_a_checkpoint(cluster):
    parts = cluster(4).run(jobs.saves)
    state = {name: value for part, _, _ in parts for name, value in part.items()}
    moved = {name: value for _, part, _ in parts for name, value in part.items()}
    assert len([name for name in state if ".experts." in name]) == 32
    straight = cluster(4).run(jobs.goes_on, state, moved, parts[0][2])
    for size in (1, 2):
        fewer = cluster(size).run(jobs.goes_on, state, moved, parts[0][2])
        whole = {name: value for part in fewer for name, value in part.items()}
        wanted = {name: value for part in straight for name, value in part.items()}
        assert whole.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(whole[name], value, atol=1e-6), name
    model = jobs.Model()
    model.load_state_dict(dict(state))
    assert torch.equal(model.moe.up[5], state["moe.experts.5.up"])


def test_a_dead_rank_is_named():
    ranks = Cluster(4)
    try:
        answers = ranks.results(jobs.killed)
        for rank in (0, 2, 3):
            assert answers[rank].startswith("PeerLost: rank 1"), answers[rank]
    finally:
        ranks.close()


# --------------------------------------------------------------------------------------------- when it pays


def test_break_even_is_e_h_over_k():
    shape = MixtureShape(tokens=100, width=512, hidden=2048, experts=8, k=2, ranks=4)
    assert shape.row_values == 4 * 100 * 2 * 512 * 3 / 4
    assert shape.break_even_tokens() == pytest.approx(8 * 2048 / 2, rel=2e-3)  # and the biases
    at = MixtureShape(round(shape.break_even_tokens()), 512, 2048, 8, 2, 4)
    assert at.row_values == pytest.approx(at.gradient_values, rel=1e-3)
    assert bits_per_value("identity", 512) == 32
    assert bits_per_value("bf16", 512) == 16
    assert 8 < bits_per_value("qsgd:bits=8", 512) < 8.1
    # Bars of rows: at most 0.28 of float32, and 0.53 of bf16 with their scales.
    assert bits_per_value("qsgd:bits=8", 16) / 32 < 0.28
    assert bits_per_value("mxfp8", 16) / bits_per_value("bf16", 16) < 0.53
    moe = MixtureOfExperts(512, 64, experts=8, k=2, wire="qsgd:bits=8")
    assert "T < E H / k = 258 tokens" in moe.summary(100)
    assert "while T < 1,0" in moe.summary(100)
    assert moe.summary(100).endswith("send rows")
    assert moe.summary(100_000).endswith("send gradients")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixtureOfExperts(4, 4, experts=4, k=5), "a token is given to 1 to 4 experts, not 5"),
        (lambda: MixtureOfExperts(4, 4, wire="no_such_codec"), "no_such_codec"),
        (lambda: balance_loss(torch.nn.Linear(2, 2)), "has no MixtureOfExperts"),
        (lambda: jobs.mixture("mixed").load_state_dict({"gate.clean": torch.zeros(16, 8)}), "lacks expert 0"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(distcomp.DistcompError, match=words):
        make()
