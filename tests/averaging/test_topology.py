"""Graphs and mixing weights: what every topology must be, and the numbers of the literature."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcomp.averaging.topology import (
    TOPOLOGIES,
    Topology,
    complete,
    exponential,
    from_graph,
    hypercube,
    metropolis,
    one_peer_exponential,
    random_regular,
    resolve,
    ring,
    star,
    torus,
)
from distcomp.errors import DistcompError


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("size", [8, 16, 64])
def test_every_topology_mixes(name: str, size: int) -> None:
    topology = resolve(name, size)
    for step, matrix in enumerate(topology.matrices):
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix, matrix.T)
        np.testing.assert_allclose(matrix.sum(axis=1), 1)
        for rank in range(size):
            row = topology.row(rank, step)
            assert row.own + sum(row.weights) == pytest.approx(1)
            assert all(rank in topology.row(j, step).neighbours for j in row.neighbours)
    assert 0 <= topology.rho < 1
    assert topology.connected


@pytest.mark.parametrize(
    ("size", "rho", "mu", "alpha"),
    [(4, 0.333, 4 / 3, 0.25), (8, 0.805, 4 / 3, 0.073), (16, 0.949, 4 / 3, 0.019)],
)
def test_a_ring_has_the_numbers_of_the_paper(size: int, rho: float, mu: float, alpha: float) -> None:
    topology = ring(size)
    assert topology.row(1).weights == pytest.approx((1 / 3, 1 / 3))
    assert topology.rho == pytest.approx(rho, abs=1e-3)
    assert topology.mu == pytest.approx(mu, abs=1e-3)
    assert (1 - topology.rho) / (2 * topology.mu) == pytest.approx(alpha, abs=1e-3)


def test_degrees() -> None:
    assert [resolve(name, 16).degree(3) for name in ("ring", "torus", "hypercube", "complete")] == [
        2,
        4,
        4,
        15,
    ]
    assert exponential(16).degree(3) == 7  # 1, 2, 4 places away on either side, and 8 on both
    assert one_peer_exponential(16).degree(3) == 1
    assert star(5).degree(0) == 4
    assert {random_regular(10, 3, seed).degree(rank) for seed in range(3) for rank in range(10)} == {3}


def test_two_workers_share_one_edge() -> None:
    assert ring(2).row(0).neighbours == (1,)
    assert ring(2).row(0).weights == (0.5,)


def test_one_worker_talks_to_nobody() -> None:
    for make in (ring, complete, star, hypercube, exponential, one_peer_exponential):
        topology = make(1)
        assert topology.row(0).neighbours == ()
        assert topology.row(0).own == 1


def test_one_peer_exponential_averages_exactly_in_log2_n_exchanges() -> None:
    product = np.linalg.multi_dot(one_peer_exponential(16).matrices)
    np.testing.assert_allclose(product, np.full((16, 16), 1 / 16))
    assert one_peer_exponential(16).changes
    assert one_peer_exponential(16).rho == 0


def test_metropolis_weights_by_hand() -> None:
    """A path of three: degrees 1, 2, 1."""
    expected = np.array([[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(metropolis(3, [(0, 1), (1, 2)]), expected)
    np.testing.assert_allclose(from_graph(networkx.path_graph(3)).matrices[0], expected)


def test_a_random_graph_is_a_function_of_its_seed() -> None:
    assert random_regular(20, 4, 1) == random_regular(20, 4, 1)
    assert random_regular(20, 4, 1) != random_regular(20, 4, 2)
    assert len({random_regular(20, 4, 1), random_regular(20, 4, 1)}) == 1


@given(st.integers(3, 12), st.data())
def test_survivors_still_mix(size: int, data: st.DataObject) -> None:
    """What is left of W when workers are gone is symmetric and doubly stochastic again."""
    topology = data.draw(st.sampled_from([ring(size), star(size), complete(size), exponential(size)]))
    dead = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    alive = [rank for rank in range(size) if rank not in dead]
    matrix = np.zeros((size, size))
    for rank in alive:
        row = topology.row(rank).without(dead)
        assert dead.isdisjoint(row.neighbours)
        matrix[rank, rank] = row.own
        matrix[rank, list(row.neighbours)] = row.weights
    rest = matrix[np.ix_(alive, alive)]
    np.testing.assert_allclose(rest, rest.T)
    np.testing.assert_allclose(rest.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: resolve("mesh", 4), "there is no topology 'mesh'"),
        (lambda: resolve(ring(4), 5), "for 4 workers and there are 5"),
        (lambda: hypercube(6), "power of two"),
        (lambda: one_peer_exponential(12), "power of two"),
        (lambda: torus(7), "make no grid"),
        (lambda: random_regular(5, 3), "product even"),
        (lambda: resolve(from_graph(networkx.Graph([(0, 1), (2, 3)])), 4), "falls apart"),
        (lambda: from_graph(networkx.DiGraph([(0, 1)])), "undirected"),
        (lambda: metropolis(2, [(0, 2)]), "links no two"),
        (lambda: Topology("mine", [np.array([[0.5, 0.5], [0.6, 0.4]])]), "not symmetric"),
        (lambda: Topology("mine", [np.ones((2, 3))]), "not square"),
        (lambda: one_peer_exponential(4).mu, "fixed topology"),
    ],
)
def test_what_is_no_topology_is_refused(wrong: object, sentence: str) -> None:
    with pytest.raises(DistcompError, match=sentence):
        wrong()  # type: ignore[operator]
