"""Models averaged across replicas of FSDP2: what one process to a worker does, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import distcomp
from distcomp import averaging
from distcomp.averaging.periodic import Periodic
from distcomp.layout import Layout
from distcomp.methods import compressor_of, qsgd
from tests.attaching.fsdp import replica_jobs as jobs
from tests.cluster import Cluster, Failure

IDENTITY = {
    "diloco": distcomp.diloco(period=3),
    # Its two fragments are cut between the same parameters, whole or in shards.
    "streaming_diloco": distcomp.streaming_diloco(period=4, fragments=2, compressor="identity"),
    "choco": distcomp.choco(compressor="identity", gamma=0.5, period=2),
}
CHUNKS = {
    "sparse_loco": distcomp.sparse_loco(period=3, ratio=1 / 16, chunk=256, values="fp16"),
    "diloco": distcomp.diloco(period=3, compressor="ef21:compressor=(topk:ratio=0.1,chunk=256)"),
    "choco": distcomp.choco("quantize:bits=4,block=256,rounding=nearest", gamma=0.5, period=2),
}


@pytest.mark.parametrize(
    ("spec", "whole"),
    [(spec, "odd") for spec in IDENTITY.values()] + [(spec, "even") for spec in CHUNKS.values()],
    ids=[f"{name}-identity" for name in IDENTITY] + [f"{name}-chunks" for name in CHUNKS],
)
def test_islands_have_the_bits_of_single_workers(cluster, spec, whole):
    """Nothing is compressed; or chunks are, which lie in shards as they lie in whole matrices."""
    expected = cluster(2).run(jobs.workers, spec, 8, whole)
    for rank, (own, mean, spread, end, stats) in enumerate(cluster(4).run(jobs.islands, spec, 8, whole)):
        worker = expected[rank // 2]
        assert torch.equal(own, worker[0])
        assert torch.equal(mean, worker[1])
        assert spread == pytest.approx(worker[2], rel=1e-5)
        assert torch.equal(end, worker[3])
        assert stats["iterations"] == 8


@pytest.mark.parametrize(
    ("spec", "exact"),
    [
        (averaging.pqasgd(period=4, bits=4, block=256), distcomp.local_sgd(period=4)),
        (
            distcomp.sparse_loco(period=4, ratio=1 / 16, chunk=256),
            distcomp.sparse_loco(period=4, ratio=1 / 16, chunk=256, values="identity"),
        ),
        (
            distcomp.streaming_diloco(period=4, fragments=2, overlap=0, alpha=0.0),
            distcomp.streaming_diloco(period=4, fragments=2, overlap=0, alpha=0.0, compressor="identity"),
        ),
        (
            distcomp.choco("qsgd:bits=4", gamma=0.5, period=2),
            distcomp.choco("identity", gamma=0.5, period=2),
        ),
    ],
    ids=["pqasgd", "sparse_loco", "streaming_diloco", "choco"],
)
def test_rounding_at_random_errs_as_much_as_on_whole_models(cluster, spec, exact):
    """How far what is rounded ends from what is not, of 4,096 weights: a shard's blocks are blocks."""
    (alone, *_), (alone_exact, *_) = (cluster(2).run(jobs.workers, one, 4, "even") for one in (spec, exact))
    error = (alone[0] - alone_exact[0]).norm()
    assert error > 0
    for found in cluster(4).run(jobs.islands, spec, 4, "even")[:2]:
        assert 0.7 < (found[0] - alone_exact[0]).norm() / error < 1.4


SHARD = Layout.of([("0.weight", (32, 16)), ("2.weight", (8, 64)), ("3.weight", (16, 16))])
"""One of two shards of :func:`replica_jobs.even`."""


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (distcomp.diloco(period=2), 4 * SHARD.numel),
        (averaging.pqasgd(period=2, bits=4), qsgd(bits=4).payload_bytes(SHARD, 2, 0)),
        (distcomp.sparse_loco(period=2, ratio=1 / 16, chunk=256), 80 * (8 + 2) / 8 + 5 * 4),
        (distcomp.choco("qsgd:bits=4", period=2), compressor_of("qsgd:bits=4").wire_bytes(SHARD)),
    ],
    ids=["diloco", "pqasgd", "sparse_loco", "choco"],
)
def test_bytes_across_replicas_are_the_formulas(cluster, spec, expected):
    """Each rank sends its shard's payload to the one that holds the same, once a period."""
    for *_, stats in cluster(4).run(jobs.islands, spec, 6, "even"):
        assert stats["last"]["payload_bytes"] == pytest.approx(expected, abs=80)  # headers
        broadcasts = 2 * 4 * SHARD.numel
        assert stats["payload_bytes"] < 3 * (expected + 80) + broadcasts
        periodic = stats["conditions"].get("bytes_per_step", expected / 2)
        assert periodic == pytest.approx(expected / 2, abs=40)


@pytest.mark.parametrize(
    "spec",
    [
        distcomp.diloco(period=3, compressor="qsgd:bits=1"),
        distcomp.streaming_diloco(period=4, fragments=2, overlap=2),
        distcomp.sparse_loco(period=3, ratio=0.1, chunk=64),
        distcomp.choco("qsgd:bits=4"),
    ],
    ids=["diloco", "streaming_diloco", "sparse_loco", "choco"],
)
def test_resume_is_bit_equal(cluster, spec):
    for through, again in cluster(4).run(jobs.resumed, spec, 5, 11):
        assert torch.equal(through, again)


def test_a_checkpoint_goes_on_with_another_number_of_replicas(cluster, tmp_path):
    """Each shard is the mean of those who held it; on other shards it is refused by name."""
    spec = distcomp.diloco(period=4, compressor="qsgd:bits=1")
    own = cluster(4).run(jobs.saved_by_dcp, spec, tmp_path, 6)
    assert not torch.equal(own[0], own[2])
    for refusal, weights, iterations in cluster(2).run(jobs.loaded_by_dcp, spec, tmp_path, 1):
        assert refusal == ""
        torch.testing.assert_close(weights, (own[0] + own[2]) / 2)
        assert iterations == 8
    for refusal, *_ in cluster(2).run(jobs.loaded_by_dcp, spec, tmp_path, 2):
        assert "the checkpoint is of shard 1 of 2, shard 2 of 2" in refusal
        assert "holds shard 1 of 1" in refusal


def test_gradients_accumulate_and_are_one_iteration(cluster):
    for as_fsdp_says, as_the_handle_says, iterations in cluster(4).run(jobs.accumulated):
        assert torch.equal(as_fsdp_says, as_the_handle_says)
        assert iterations == 4


def test_the_optimizers_state_is_averaged_or_forgotten(cluster):
    for rank, found in enumerate(averages := cluster(4).run(jobs.optimizer_states, "average")):
        count = len(found) // 2
        for index in range(count):
            mean = (averages[0][index] + averages[2][index]) / 2
            assert not torch.equal(mean, averages[rank][index])
            torch.testing.assert_close(found[count + index], mean)
    for found in cluster(4).run(jobs.optimizer_states, "reset"):
        assert found[len(found) // 2 :] == [None] * (len(found) // 2)


def test_a_nan_in_one_shard_is_an_error_on_every_rank(cluster):
    assert all("training diverged" in sentence for sentence in cluster(4).run(jobs.diverging))


@pytest.fixture
def six() -> Iterator[Cluster]:
    """Three islands of two ranks of their own: one of them does not survive."""
    ranks = Cluster(6)
    yield ranks
    ranks.close()


def test_gossip_goes_on_without_a_replica_that_died(six):
    found = six.results(jobs.mourning, distcomp.choco(on_failure="continue"), 20.0)
    for one in (*found[:2], *found[4:]):
        assert not isinstance(one, Failure)
        assert "error" not in one
        assert one["lost"] == [1]
        torch.testing.assert_close(one["end"], (found[0]["own"] + found[4]["own"]) / 2)
        assert one["warned"] == ["rank 1 died or hangs; training goes on without it"]


def test_by_default_training_stops_and_names_the_replica_that_died(six):
    found = six.results(jobs.mourning, distcomp.diloco(period=2), 10.0)
    for one in (*found[:2], *found[4:]):
        assert one["error"].startswith("PeerLost: rank 1 died"), one


REFUSED = {
    ("no replicas", "diloco"): "which ranks hold the same shard",
    ("two dimensions", "diloco"): "mesh of 2 dimensions",
    ("", "post_local_sgd"): "use local_sgd or diloco",
    ("short", Periodic(period=4, fragments=2)): "in 2, 1 fragments",
    ("empty", "diloco"): "in 1, 0 fragments",
    ("gradients before", "diloco"): "FSDP cannot forget",
}


@pytest.mark.parametrize(("kind", "spec"), REFUSED)
def test_what_cannot_be_served_is_refused_with_its_reason(cluster, kind, spec):
    for sentence in cluster(4).run(jobs.refusal, kind, spec):
        assert REFUSED[kind, spec] in sentence
