"""The joint with the wire: gradients on a grid are added as integers, in any pattern, over any transport."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distcomp
from distcomp import precision
from distcomp.compressors import FixedPoint
from distcomp.compressors.fixed import integer_bytes, pack_integers, unpack_integers
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import FixedPointAllReduce
from distcomp.methods.integers import pack_fields, unpack_fields
from distcomp.randomness import Key
from distcomp.runtime.lockstep import Lockstep
from tests import lockstep
from tests.attaching.ddp import jobs
from tests.compressors.oracles import noise
from tests.lockstep import World
from tests.precision import oracles

PATTERNS = ("all_reduce", "reduce_scatter", "all_gather")
LAYOUT = Layout.of([("a", (37, 11)), ("b", (5,)), ("empty", (0,)), ("c", ())])


def converse(
    method: FixedPointAllReduce, xs: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], Lockstep]:
    """Estimates, contributions, and the net with its ledgers."""
    net = Lockstep(len(xs))
    round_ = lockstep.converse(method, xs, [{}] * len(xs), LAYOUT, shared=Key.of(3), net=net)
    return round_.estimates, round_.contributions(), net


def drawn(size: int, scale: float = 1.0) -> list[torch.Tensor]:
    return [
        scale * torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(rank))
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("format", ["Q2.2", "Q4.12", "Q1.20"])
def test_every_pattern_gives_the_bits_of_the_sum_of_integers(size, format) -> None:
    q, xs = FixedPoint.of(format), drawn(size)
    found = {}
    for pattern in PATTERNS:
        estimates, contributions, net = converse(FixedPointAllReduce(q, pattern), xs)
        assert all(torch.equal(one, estimates[0]) for one in estimates)
        exact = sum((one.double() / q.spacing for one in contributions), torch.zeros(LAYOUT.numel).double())
        assert torch.equal(exact, exact.round())
        assert torch.equal(estimates[0], (exact * (q.spacing / size)).float())
        assert all(torch.equal(one, q.round(one)) for one in contributions)
        sent = sum(ledger.total_bytes for ledger in net.ledgers) / size
        assert abs(sent - FixedPointAllReduce(q, pattern).payload_bytes(LAYOUT, size, 0)) <= size
        found[pattern] = estimates[0]
    assert torch.equal(found["all_reduce"], found["reduce_scatter"])
    assert torch.equal(found["all_reduce"], found["all_gather"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_lies_on_the_grid_is_sent_without_a_second_rounding(pattern) -> None:
    q = FixedPoint.of("Q4.12")
    xs = [q.round(x) for x in drawn(3, 5.0)]
    estimates, contributions, _ = converse(FixedPointAllReduce(q, pattern), xs)
    assert all(torch.equal(given, x) for given, x in zip(contributions, xs, strict=True))
    assert torch.equal(estimates[0], (sum(x.double() for x in xs) / 3).float())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_every_rank(pattern, bad) -> None:
    xs = drawn(3)
    xs[1][5] = bad
    estimates, _, _ = converse(FixedPointAllReduce(FixedPoint.of("Q4.12"), pattern), xs)
    assert not any(one.isfinite().any() for one in estimates)


def test_the_ledger_counts_the_bits_of_the_grid() -> None:
    """8-bit gradients of 4 ranks: 8 bits to the owner, 10 bits back, three quarters of each."""
    layout = Layout.of([("w", (4096,))])
    method = FixedPointAllReduce(FixedPoint.of("Q2.6"), "reduce_scatter")
    world = World(method, 4, layout)
    world.aggregate([torch.randn(4096) for _ in range(4)])
    assert [ledger.sent_bytes["codes"] for ledger in world.net.ledgers] == [3 * 1024 * (8 + 10) // 8] * 4
    assert method.chosen(4) == "reduce_scatter"
    assert FixedPointAllReduce(FixedPoint.of("Q2.6")).chosen(2) == "all_gather"


@given(st.integers(2, 31), st.integers(0, 40), st.integers(0, 1000))
def test_integers_of_any_width_are_packed_and_come_back(bits, numel, seed) -> None:
    codes = torch.randint(0, 2**bits, (numel,), generator=torch.Generator().manual_seed(seed))
    packed = pack_integers(codes, bits)
    assert packed.numel() == integer_bytes(numel, bits)
    assert numel * bits <= 8 * packed.numel() < numel * bits + 40
    assert torch.equal(unpack_integers(packed, numel, bits), codes)


@pytest.mark.parametrize(("bits", "size"), [(8, 4), (8, 8), (4, 16), (6, 4), (16, 2), (5, 8)])
def test_the_lowest_sum_of_all_fits_its_fields(bits, size) -> None:
    """Two's complement of b + ceil(log2 n) bits holds n times -2^(b-1) exactly, in every field of a word."""
    width = bits + (size - 1).bit_length()
    low = torch.full((2 * (32 // width) + 1,), -(2 ** (bits - 1)), dtype=torch.int32)
    high = torch.full_like(low, 2 ** (bits - 1) - 1)
    for codes in (low, high, torch.where(torch.arange(len(low)) % 2 == 0, low, high)):
        total = sum(pack_fields(codes, width).numpy().astype(np.int64) for _ in range(size))
        words = torch.from_numpy(total.astype(np.uint64).astype(np.uint32).view(np.int32).copy())
        assert torch.equal(unpack_fields(words, len(codes), width), codes * size)


def test_a_sum_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DistcompError, match="32 bits"):
        FixedPointAllReduce(FixedPoint.of("Q1.20")).payload_bytes(LAYOUT, 4096, 0)
    with pytest.raises(DistcompError, match="pattern"):
        distcomp.fixed_point(pattern="nosuch")
    with pytest.raises(DistcompError, match="fixed-point"):
        distcomp.fixed_point(format="4 bits")


def test_the_wire_rounds_as_the_paper_says() -> None:
    q, x = FixedPoint(3, 5), drawn(1)[0]
    u = noise(LAYOUT, Key.of(3).fold("rank", 0).fold("round"))
    (estimate,), _, _ = converse(FixedPointAllReduce(q, "all_gather"), [x])
    expected = [oracles.fixed(one, 3, 5, at) for one, at in zip(x.tolist(), u.tolist(), strict=True)]
    assert estimate.tolist() == expected


# ------------------------------------------------------------------------------------------- real processes


def model(rank: int) -> nn.Module:
    return precision.fixed_point(jobs.network(), "Q4.12", gradients="Q2.14", rank=rank)


def trained(rank: int, size: int, pattern: str) -> dict[str, object]:
    """A fixed-point run: its weights and losses, whether all ranks hold the same, and the ledger."""
    ddp = jobs.wrap(model(rank))
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    with distcomp.attach(ddp, optimizer, f"fixed_point:format=Q2.14,pattern={pattern}") as handle:
        losses = jobs.train(ddp, optimizer, rank, 6)
        sent = handle.stats()["payload_by_kind"]
    same = jobs.replicas_equal(ddp)
    return {"weights": jobs.flat(ddp).tolist(), "losses": losses, "same": same, "sent": dict(sent)}


def in_lockstep(size: int) -> list[float]:
    """The same run in one process."""
    models = [model(rank) for rank in range(size)]
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in models]
    names = [name for name, _ in models[0].named_parameters()][::-1]
    shapes = {name: tuple(one.shape) for name, one in models[0].named_parameters()}
    layout = Layout.of([(name, shapes[name]) for name in names])
    method = distcomp.parse("fixed_point:format=Q2.14,pattern=all_reduce")
    world, feeds = World(method, size, layout), [list(jobs.batches(rank, 6)) for rank in range(size)]
    for step in range(6):
        buffers = []
        for rank, one in enumerate(models):
            x, y = feeds[rank][step]
            optimizers[rank].zero_grad()
            nn.functional.cross_entropy(one(x), y).backward()
            gradients = dict(one.named_parameters())
            buffers.append(torch.cat([gradients[name].grad.flatten() for name in names]))
        results = world.aggregate(buffers)
        for rank, one in enumerate(models):
            parameters = dict(one.named_parameters())
            for param, piece in layout.pieces(results[rank].estimate):
                parameters[param.name].grad = piece.view(param.shape).clone()
            optimizers[rank].step()
    return jobs.flat(models[0]).tolist()


def test_a_fixed_point_run_is_the_same_over_every_pattern_and_transport_and_twice(cluster) -> None:
    """At four ranks, where a ring of floats would differ by the order of its sums."""
    runs = {pattern: cluster(4).run(trained, pattern) for pattern in PATTERNS}
    assert all(one["same"] for run in runs.values() for one in run)
    again = cluster(4).run(trained, "reduce_scatter")
    weights = runs["all_reduce"][0]["weights"]
    assert (
        weights
        == runs["reduce_scatter"][0]["weights"]
        == runs["all_gather"][0]["weights"]
        == again[0]["weights"]
    )
    assert weights == in_lockstep(4)
    assert runs["reduce_scatter"][0]["sent"]["codes"] < runs["all_reduce"][0]["sent"]["codes"]


def alone(name: str, ranks: int) -> tuple[torch.Tensor, list[list[float]]]:
    """Weights and every rank's losses of training in one process, on all ranks' batches at once."""
    net = getattr(precision, name)(jobs.network(), skip=())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for step in zip(*(jobs.batches(rank, 5) for rank in range(ranks)), strict=True):
        optimizer.zero_grad()
        each = [nn.functional.cross_entropy(net(x), y) for x, y in step]
        torch.stack(each).mean().backward()
        optimizer.step()
        losses.append([one.item() for one in each])
    return jobs.flat(net), [list(ranks_losses) for ranks_losses in zip(*losses, strict=True)]


def sharded(rank: int, size: int, name: str) -> tuple[list[float], list[float]]:
    """Weights and losses of a model under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = getattr(precision, name)(jobs.network(), skip=())
    fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    losses = jobs.train(net, torch.optim.SGD(net.parameters(), 0.1), rank, 5)
    return torch.cat([one.full_tensor().flatten() for one in net.parameters()]).tolist(), losses


@pytest.mark.parametrize("name", ["binary_connect", "ttq"])
def test_converted_models_are_sharded_as_others_are(cluster, name) -> None:
    """Latent weights are clipped in every shard; the two magnitudes of a layer are sharded, too."""
    weights, losses = alone(name, 2)
    assert (weights - jobs.flat(getattr(precision, name)(jobs.network(), skip=()))).abs().max() > 0.01
    for rank, (sharded_weights, sharded_losses) in enumerate(cluster(2).run(sharded, name)):
        torch.testing.assert_close(torch.tensor(sharded_weights), weights, rtol=1e-4, atol=1e-5)
        assert sharded_losses == pytest.approx(losses[rank], rel=1e-4)
