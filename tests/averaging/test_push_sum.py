"""SGP: directed edges, and weights that make up for those who hear more than others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.averaging.digraph import DIGRAPHS, Digraph, directed_exponential, directed_ring, resolve_digraph
from distcomp.averaging.push_sum import SGP, sgp
from distcomp.averaging.workers import Workers
from distcomp.collectives import Push
from distcomp.errors import DistcompError, Mismatch
from distcomp.payload import Part, Payload, wire_bytes
from distcomp.runtime.lockstep import Lockstep
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, consensus, stacked

NUMEL, RATE = 40, 0.1
UNEVEN = Digraph.of(6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 3), (1, 3), (2, 0), (4, 3)])
"""A directed ring with chords: everybody's word reaches everybody, and rank 3 hears most."""


def graph_of(name: str, size: int) -> Digraph:
    return UNEVEN if name == "uneven" else resolve_digraph(name, size)


@pytest.mark.parametrize("name", DIGRAPHS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12])
def test_no_share_is_lost_and_everybody_is_reached(name: str, size: int) -> None:
    graph, product = resolve_digraph(name, size), np.eye(size)
    for step in range(4 * size):
        matrix = graph.matrix(step)
        np.testing.assert_allclose(matrix.sum(axis=0), 1)
        for rank in range(size):
            assert all(rank in graph.sources(j, step) for j in graph.targets(rank, step))
        product = matrix @ product
    assert (product > 0).all()


def test_the_papers_graph() -> None:
    graph = directed_exponential(8)
    assert [graph.targets(6, step) for step in range(4)] == [(7,), (0,), (2,), (7,)]
    assert len(directed_exponential(9).rounds) == 4
    product = np.linalg.multi_dot([graph.matrix(step) for step in range(3)])
    np.testing.assert_allclose(product, np.full((8, 8), 1 / 8))  # all agree after log2 n exchanges


@pytest.mark.parametrize(
    ("name", "workers"), [("directed_exponential", 5), ("directed_ring", 4), ("uneven", 6)]
)
def test_it_is_what_the_paper_says(name: str, workers: int) -> None:
    problem, graph = Quadratic(workers, NUMEL), graph_of(name, workers)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()

    def step(z: Matrix) -> Matrix:
        return RATE * curvature * (z - optima)

    # Workers train before they exchange: the oracle's first step is made at z = x as well.
    found = problem.train(SGP(graph=graph), 30, RATE)
    expected = oracles.sgp(np.zeros((workers, NUMEL)), graph.matrix, step, 30)
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=2e-5)


def mass(workers: Workers) -> torch.Tensor:
    """The sum of all workers' biased models, and of their weights behind it."""
    states = [fragments[0].state for fragments in workers.fragments]
    sums = [torch.cat([state["biased"].data, *state["weight"].values()]).double() for state in states]
    return torch.stack(sums).sum(0)


edges = st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda edge: edge[0] != edge[1]))


@given(edges, st.integers(0, 2**16))
def test_mass_is_conserved_on_any_graph_and_the_debiased_models_reach_the_mean(
    chords: set[tuple[int, int]], seed: int
) -> None:
    graph = Digraph.of(5, {(rank, (rank + 1) % 5) for rank in range(5)} | chords)
    starts = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
    workers = consensus(SGP(graph=graph), starts, 60)
    torch.testing.assert_close(mass(workers)[:-1], starts.double().sum(0), atol=1e-4, rtol=0)
    assert mass(workers)[-1] == pytest.approx(5, abs=1e-5)
    torch.testing.assert_close(stacked(workers), starts.mean(0).expand(5, -1), atol=1e-3, rtol=0)


def test_without_the_weight_an_uneven_graph_goes_elsewhere() -> None:
    """What push-sum is for: the biased models are weighted by how much each hears."""
    starts = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    workers = consensus(SGP(graph=UNEVEN), starts, 100)
    biased = torch.stack([fragments[0].state["biased"].data for fragments in workers.fragments])
    assert float((biased - starts.mean(0)).abs().max()) > 0.1
    weights = [f[0].averaging.report(f[0].state)["push_sum_weight"] for f in workers.fragments]
    assert max(weights) == weights[3] > 1.5


def test_where_all_hear_alike_the_weight_stays_one() -> None:
    workers = consensus(sgp(graph="directed_ring"), torch.randn(5, 20), 50)
    for fragments in workers.fragments:
        assert fragments[0].averaging.report(fragments[0].state) == {"push_sum_weight": 1.0}


def test_an_optimum_is_reached_on_an_uneven_graph_as_on_an_even_one() -> None:
    problem = Quadratic(6, NUMEL)
    for graph in (UNEVEN, directed_ring(6)):
        assert problem.error(problem.train(SGP(graph=graph), 300, 0.02)) < 0.02


def test_bytes_are_a_payload_per_target_and_a_receipt_per_source() -> None:
    payload_bytes = wire_bytes((Part("values", torch.float32, NUMEL + 1),))
    workers = Workers(SGP(graph=UNEVEN), torch.zeros(NUMEL), 6)
    for _ in range(3):
        workers.step()
    for rank, ledger in enumerate(workers.net.ledgers):
        targets, sources = UNEVEN.targets(rank, 0), UNEVEN.sources(rank, 0)
        receipts = len(set(sources) - set(targets))
        assert ledger.total_bytes == 3 * (len(targets) * payload_bytes + receipts * 32)


def test_two_ends_that_disagree_are_named() -> None:
    def push(targets: tuple[int, ...], sources: tuple[int, ...]) -> Push:
        return Push(Payload.empty((Part("values", torch.float32, 1),)), targets, sources)

    asked = [push((1,), (1,)), push((), (0,))]
    with pytest.raises(Mismatch, match="rank 0 and rank 1 do not agree on who of them sends to whom"):
        asked[0].check_against(0, asked)
    assert Lockstep(2).size == 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: sgp(graph="ring"), "there is no directed graph 'ring'"),
        (lambda: SGP(on_failure="continue"), "sgp stops"),
        (lambda: Digraph.of(3, [(0, 1), (1, 2)]), "not everybody's word reaches everybody"),
        (lambda: Digraph.of(2, [(0, 1), (1, 1)]), "sends to"),
        (lambda: Digraph.of(2, [(2, 1)]), "begins at none of 2 ranks"),
        (lambda: SGP(graph=UNEVEN).conditions(None, 4), "for 6 ranks and there are 4"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object], sentence: str) -> None:
    with pytest.raises(DistcompError, match=sentence):
        wrong()
