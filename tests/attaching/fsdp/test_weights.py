"""Gathers of weights in few bits: what every rank computes with, what it costs, and what is left behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distcomp.compressors import parse_compressor
from distcomp.layout import Layout
from distcomp.methods import compressor_of
from distcomp.methods.weight_gather import Difference, Gather, ShardCodec, parse_weight_gather
from distcomp.payload import wire_bytes
from distcomp.randomness import Key

from . import shard_jobs, titan_jobs, weight_jobs

PACKED = "gather:compressor=(quantize:bits=4),reuse=true"
MOVED = "difference:compressor=(quantize:bits=4,rounding=nearest)"
HOWS = ["bf16", "qsgd:bits=8", "quantize:bits=6,rounding=nearest", "quantize:bits=4", PACKED, MOVED]
BIASES = {"0.bias", "3.bias", "5.bias"}


def rounded(weight: np.ndarray, shards: int, bits: int) -> np.ndarray:
    """To the nearest level of each block of 512 in each shard of rows, as the paper of QSGD has it."""
    rows, levels = -(-weight.shape[0] // shards), 2 ** (bits - 1) - 1
    out = np.empty_like(weight)
    for at in range(0, weight.shape[0], rows):
        piece = weight[at : at + rows].reshape(-1)
        blocks = [piece[i : i + 512] for i in range(0, len(piece), 512)]
        coded = [np.rint(b * (levels / np.abs(b).max())) * (np.abs(b).max() / levels) for b in blocks]
        out[at : at + rows] = np.concatenate(coded).reshape(-1, *weight.shape[1:])
    return out


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", HOWS)
def test_all_ranks_compute_with_the_same_bits_and_train_their_own(cluster, size, how):
    answers = cluster(size).run(weight_jobs.computed, how, 3)
    first = answers[0][2]
    for before, after, in_forward, in_backward, _ in answers:
        assert in_forward.keys() == in_backward.keys() == first.keys()
        for name, value in in_forward.items():
            assert torch.equal(value, first[name])
            assert torch.equal(value, in_backward[name])
            assert torch.equal(value, before[name]) == (name in BIASES)
        assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_are_those_of_the_paper(cluster, bits, dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    job = weight_jobs.computed_in
    how = f"quantize:bits={bits},rounding=nearest"
    for before, _, in_forward, _, _ in cluster(2).run(job, how, MixedPrecisionPolicy(param_dtype=dtype)):
        for name in ("0.weight", "3.weight", "5.weight"):
            expected = torch.from_numpy(rounded(before[name].to(dtype).float().numpy(), 2, bits)).to(dtype)
            assert in_forward[name].dtype == dtype
            assert torch.allclose(
                in_forward[name].float(), expected.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6
            )


def farthest(found) -> float:
    before, _, in_forward, _, _ = found
    return max((before[name] - value).abs().max().item() for name, value in in_forward.items())


def test_differences_converge_to_the_exact_weights(cluster):
    """Weights that stand still are reached; without differences, four bits stay four bits."""
    (near, *_), (after, *_) = (cluster(2).run(weight_jobs.computed, MOVED, 5, n) for n in (1, 12))
    assert 1e-5 < farthest(near) < 2e-2
    assert farthest(after) < 1e-6
    coarse, *_ = cluster(2).run(weight_jobs.computed, "quantize:bits=4", 5, 12)
    assert farthest(coarse) > 1e-2


@pytest.mark.parametrize("weights", ["identity", "difference:compressor=identity"])
@pytest.mark.parametrize(
    "setup",
    [{}, {"tied": True}, {"param_dtype": torch.bfloat16}, {"micro": 2, "kept": True}, {"compiled": True}],
)
def test_identity_has_the_bits_of_plain_fsdp2(cluster, weights, setup):
    plain = cluster(2).run(titan_jobs.titan, None, setup, 3, {})
    found = cluster(2).run(titan_jobs.titan, "identity", setup, 3, {"weights": weights})
    for expected, answer in zip(plain, found, strict=True):
        if weights == "identity":
            assert torch.equal(expected[0], answer[0])
        assert torch.allclose(expected[0], answer[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("weights", ["qsgd:bits=8", MOVED])
def test_it_trains(cluster, size, weights):
    setup = {"checkpointed": True, "micro": 2}
    plain = cluster(size).run(titan_jobs.titan, None, setup, 20, {})
    found = cluster(size).run(titan_jobs.titan, "qsgd:bits=4", setup, 20, {"weights": weights})
    for expected, answer in zip(plain, found, strict=True):
        assert answer[1][-1] < 0.8 * answer[1][0]
        assert answer[1][-1] < 1.1 * expected[1][-1]


def test_what_is_left_is_plain_fsdp2(cluster):
    for plain, found in cluster(2).run(weight_jobs.left, MOVED, 3):
        assert torch.equal(plain, found)


def layouts(shards: int) -> list[Layout]:
    """The flat buffers of a rank: each Linear's, and the root's norm."""
    model = shard_jobs.network()
    named = [
        [(f"{i}.{name}", (-(-p.shape[0] // shards), *p.shape[1:])) for name, p in part.named_parameters()]
        for i, part in enumerate(model)
        if list(part.parameters())
    ]
    roles = {"1.weight": "norm", "1.bias": "norm"}
    return [Layout.of(one, {name: roles[name] for name, _ in one if name in roles}) for one in named]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("how", ["qsgd:bits=8", PACKED, MOVED])
def test_bytes_are_the_formulas(cluster, size, how, reshard):
    """The root keeps its weights after the forward in any case; a backward is gathered for anew, or not."""
    gather = parse_weight_gather(how)
    once = [gather.payload_bytes(layout, size, torch.float32) for layout in layouts(size)]
    norm = gather.payload_bytes(layouts(size)[1], size, torch.float32)
    twice = reshard and how == "qsgd:bits=8"
    expected = sum(once) + (sum(once) - norm if twice else 0)
    for counted in cluster(size).run(weight_jobs.sent, how, 3, reshard):
        headers = (size - 1) * 32 * 4 * (2 if twice else 1)
        assert abs(counted["weights"] - 3 * expected) < 3 * headers + 3 * 64
        assert counted["weights"] < 3 * expected


def test_what_is_kept_is_the_formulas(cluster):
    for how in ("qsgd:bits=8", PACKED, MOVED):
        gather = parse_weight_gather(how)
        expected = sum(gather.state_bytes(layout, 2, torch.float32) for layout in layouts(2))
        assert (expected == 0) == (how == "qsgd:bits=8")
        for *_, stats in cluster(2).run(weight_jobs.computed, how, 2):
            assert stats["state_bytes"] == expected


@pytest.mark.parametrize("weights", ["qsgd:bits=8", PACKED, MOVED, "difference:compressor=(qsgd:bits=4)"])
def test_resume_is_bit_equal(cluster, weights):
    assert all(cluster(2).run(weight_jobs.resumed, weights))


def test_another_number_of_ranks_begins_anew_with_a_word(cluster):
    saved = cluster(4).run(weight_jobs.saved_state, MOVED)
    for said, loss in cluster(2).run(weight_jobs.begun_anew, MOVED, saved):
        assert any("begins anew" in one for one in said)
        assert math.isfinite(loss)


@pytest.mark.parametrize("weights", ["qsgd:bits=8", MOVED])
def test_a_weight_that_is_not_finite_is_seen_everywhere_and_forgotten(cluster, weights):
    assert all(seen and mended for seen, mended in cluster(2).run(weight_jobs.poisoned, weights))


REFUSED = {
    ("ddp", "int8"): "has none",
    ("replicas", "int8"): "those who hold the same shard",
    ("differs", "int8"): "weights",
    ("", "topk:ratio=0.1"): "leaves out most values",
    ("", "difference"): "needs a compressor",
    ("", "difference:compresor=int8"): "did you mean compressor",
    ("", "qsdg:bits=8"): "no gather of weights 'qsdg'",
    ("", "powersgd"): "exchange of all ranks",
}


@pytest.mark.parametrize(("kind", "weights"), REFUSED)
def test_what_cannot_be_served_is_refused_with_its_reason(cluster, kind, weights):
    for sentence in cluster(2).run(weight_jobs.refusal, kind, weights):
        assert REFUSED[kind, weights] in sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["quantize:bits=3", "bf16", "natural", "sign", "int8"])
def test_a_shard_is_one_payload_of_any_compressor(text, dtype):
    layout = Layout.of([("a", (7, 5)), ("b", (3,)), ("c", (1,)), ("d", (9, 3))], {"c": "norm"})
    codec = ShardCodec(parse_compressor(text), dtype)
    x = torch.randn(layout.numel, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    payload = codec.encode(x, layout, Key.of(1))
    assert payload.wire.numel() == wire_bytes(codec.parts(layout))
    out = torch.full_like(x, float("nan"))
    codec.decode_into(out, payload, layout)
    assert torch.equal(out[35:39], x[35:39])
    coded = Layout.of([("a", (7, 5)), ("d", (9, 3))])
    alone = codec.compressor.decode(
        codec.compressor.encode(torch.cat([x[:35], x[39:]]), coded, Key.of(1)), coded
    )
    assert torch.equal(torch.cat([out[:35], out[39:]]), alone)


def test_texts() -> None:
    assert parse_weight_gather("qsgd:bits=8") == Gather(compressor_of("qsgd:bits=8"))
    assert parse_weight_gather(PACKED) == Gather(parse_compressor("quantize:bits=4"), reuse=True)
    assert parse_weight_gather("difference:compressor=int8") == Difference(parse_compressor("int8"))


FROZEN = "gather:compressor=(qsgd:bits=8),keep_frozen=true"


@pytest.mark.parametrize("how", [FROZEN, FROZEN + ",reuse=true"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_frozen_weights_are_gathered_once_and_trained_ones_go_on(cluster, size, dtype, how):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = None if dtype == torch.float32 else MixedPrecisionPolicy(param_dtype=dtype)
    answers = cluster(size).run(weight_jobs.frozen_kept, how, policy)
    rows = {"base": -(-37 // size) * 16, "second": -(-16 // size) * 37}
    for one in answers:
        for mine, theirs in zip(one["seen"], answers[0]["seen"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        first, second, third, fourth = np.diff([0, *one["sent"]])
        assert first - second > (size - 1) * (rows["base"] + rows["second"])  # 8 bits of both, once
        assert second == third
        assert (fourth > third) == (dtype == torch.float32)  # what is trained again is sent again
        assert one["kept"] > size * (rows["base"] + rows["second"])
        for value, exact in zip(one["after"], one["exact"], strict=True):  # left: FSDP's own gathers again
            assert torch.equal(value.float(), exact.to(dtype).float())
    base, exact = answers[0]["seen"][1][0].float(), answers[0]["exact"][0]
    assert 0 < (base - exact).abs().max() < 0.02


def test_frozen_weights_that_changed_are_refused_and_a_resumed_run_has_the_same(cluster):
    for told in cluster(2).run(weight_jobs.frozen_changed, FROZEN):
        assert "frozen weights of 0 (0.base.weight, ...) changed since they were gathered" in told
        assert "detach and attach again" in told
    assert all(cluster(2).run(weight_jobs.frozen_resumed, FROZEN))
