"""A worker dies while models are exchanged: real processes, SIGKILL and SIGSTOP."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import distcomp
from distcomp.averaging.gossip import Gossip
from tests.averaging import model_jobs as jobs
from tests.averaging import return_jobs
from tests.cluster import Cluster, Failure


@pytest.fixture
def four() -> Iterator[Cluster]:
    """Ranks of their own: one of them does not survive."""
    cluster = Cluster(4)
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    ("gossip", "how"),
    [
        (distcomp.choco(on_failure="continue"), "SIGKILL"),
        (distcomp.dcd(topology="complete", on_failure="continue"), "SIGKILL"),
        (distcomp.dpsgd(topology="one_peer_exponential", on_failure="continue"), "SIGKILL"),
        (distcomp.choco("topk:ratio=0.1", on_failure="continue"), "SIGSTOP"),
    ],
    ids=["choco-ring", "dcd-complete", "dpsgd-one-peer", "choco-hangs"],
)
def test_gossip_goes_on_without_a_dead_neighbour(gossip: Gossip, how: str, four: Cluster) -> None:
    patience_s = 8.0 if how == "SIGSTOP" else 30.0  # who hangs is waited for
    found = four.results(jobs.mourning, gossip, 2, how, patience_s, without=2)
    survivors = [found[rank] for rank in (0, 1, 3)]
    assert not any(isinstance(one, Failure) or "error" in one for one in survivors), survivors
    own = torch.stack([one["own"] for one in survivors])
    assert torch.isfinite(own).all()
    for one in survivors:
        torch.testing.assert_close(one["mean"], own.mean(0))
        assert one["lost"] == [2]
        assert torch.equal(one["end"], survivors[0]["end"])
        assert one["warned"] == ["rank 2 died or hangs; training goes on without it"]
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("spec", ["choco", "local_sgd:period=2"])
def test_by_default_training_stops_and_names_the_dead(spec: str, four: Cluster) -> None:
    found = four.results(jobs.mourning, spec, 2, "SIGKILL", 10.0, without=2)
    for rank in (0, 1, 3):
        assert found[rank]["error"].startswith("PeerLost: rank 2 died"), found[rank]


SLOW = "did not answer within timeout_s=4, although alive"
EARLY = "detache"  # "averages or detaches", or already "has ended or detached"


@pytest.mark.parametrize("topology", ["ring", "complete"])
@pytest.mark.parametrize(
    ("how", "reason", "told"),
    [
        ("slow", SLOW, "as rank 2 did not answer within timeout_s"),
        ("ends", EARLY, "rank 2 came to average or to detach, and most others do not (rank 0 trains on;"),
    ],
)
def test_gossip_goes_on_without_the_slow_and_the_finished(
    how: str, reason: str, told: str, topology: str, cluster: Callable[[int], Cluster]
) -> None:
    gossip = distcomp.choco(topology=topology, on_failure="continue")
    found = cluster(4).run(jobs.straying, gossip, how, 4.0)
    survivors = [found[rank] for rank in (0, 1, 3)]
    own = torch.stack([one["own"] for one in survivors])
    for one in survivors:
        assert one["told"] == ""
        (warned,) = one["warned"]
        assert warned.startswith("rank 2 ")
        assert reason in warned
        torch.testing.assert_close(one["mean"], own.mean(0))
    assert "PeerLost: rank 2" in found[2]["told"]
    assert told in found[2]["told"]
    assert [one["threads"] for one in found] == [[]] * 4


@pytest.mark.parametrize(
    ("size", "gossip"),
    [
        (3, distcomp.choco(topology="complete", on_failure="continue")),
        (4, distcomp.averaging.ecd(on_failure="continue")),
        (3, distcomp.dpsgd(on_failure="continue")),
    ],
    ids=["choco-3", "ecd-ring-4", "dpsgd-3"],
)
def test_a_rank_that_was_given_up_is_taken_in_again(
    size: int, gossip: Gossip, cluster: Callable[[int], Cluster]
) -> None:
    found = cluster(size).run(return_jobs.returning, gossip, 6.0)
    late, others = found[return_jobs.LATE], [one for one in found if one is not found[return_jobs.LATE]]
    neighbours = [one for one in others if one["lost"]]
    assert len(neighbours) == 2
    for one in neighbours:
        assert one["lost"] == [return_jobs.LATE]
        assert one["said"][-1] == "rank 2 is back; training goes on with it"
    assert "rank 2 was given up by its neighbours and is taken in again by rank" in " ".join(late["said"])
    assert late["iterations"] == others[0]["iterations"] > late["steps"]
    own = torch.stack([one["own"] for one in found])
    assert torch.isfinite(own).all()
    for one in found:
        assert one["left out"] == []
        torch.testing.assert_close(one["mean"], own.mean(0))
        assert torch.equal(one["end"], late["end"])
        assert one["threads"] == []
        for neighbour, replica in one["replicas"].items():
            assert torch.equal(replica, found[neighbour]["public"])
