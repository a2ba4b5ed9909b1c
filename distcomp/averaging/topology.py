"""Which workers are neighbours, and with what weight: graphs, mixing matrices and how fast they mix.

A :class:`Topology` is a symmetric, doubly stochastic matrix ``W`` per step (one, or a few that alternate)::

    W = W^T,    W 1 = 1,    W_ij > 0 only along an edge (and on the diagonal)

Edges are weighted by Metropolis and Hastings: ``W_ij = 1 / (1 + max(degree_i, degree_j))``, and what is left
of each row stays with the worker itself. On a ring that is 1/3 each, on a complete graph 1/n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError

Matrix = NDArray[np.float64]
"""``W``: float64 ``[size, size]``."""
EdgeList = Iterable[tuple[int, int]]
"""Pairs of workers that are neighbours."""


@dataclass(frozen=True)
class MixingRow:
    """One worker's row of ``W``: its neighbours in rising order, their weights, and its own."""

    rank: int
    neighbours: tuple[int, ...]
    weights: tuple[float, ...]
    own: float

    def without(self, absent: Iterable[int]) -> MixingRow:
        """The row when some neighbours are gone: their weight goes to the worker itself.

        Every survivor can do that alone, and what remains of ``W`` is symmetric and doubly stochastic again.
        """
        missing = set(absent)
        if missing.isdisjoint(self.neighbours):
            return self
        kept = [(j, w) for j, w in zip(self.neighbours, self.weights, strict=True) if j not in missing]
        own = self.own + sum(w for j, w in zip(self.neighbours, self.weights, strict=True) if j in missing)
        return MixingRow(self.rank, tuple(j for j, _ in kept), tuple(w for _, w in kept), own)


class Topology:
    """The neighbours of each of ``size`` workers. ``matrices`` alternate, one per exchange.

    Raises DistcompError for a matrix that is not symmetric and doubly stochastic.
    """

    def __init__(self, name: str, matrices: Iterable[Matrix]) -> None:
        self.name = name
        self.matrices = tuple(np.asarray(matrix, dtype=np.float64) for matrix in matrices)
        for matrix in self.matrices:
            _check(name, matrix)
        self.size = len(self.matrices[0])
        self._rows: dict[tuple[int, int], MixingRow] = {}

    @property
    def changes(self) -> bool:
        """Whether neighbours change from one exchange to the next."""
        return len(self.matrices) > 1

    def row(self, rank: int, step: int = 0) -> MixingRow:
        """``rank``'s neighbours and weights in the exchange number ``step``."""
        turn = step % len(self.matrices)
        if (rank, turn) not in self._rows:
            weights = self.matrices[turn][rank]
            neighbours = tuple(int(j) for j in np.flatnonzero(weights) if j != rank)
            self._rows[rank, turn] = MixingRow(
                rank, neighbours, tuple(float(weights[j]) for j in neighbours), float(weights[rank])
            )
        return self._rows[rank, turn]

    def degree(self, rank: int) -> float:
        """Neighbours per exchange, on average over a period."""
        steps = range(len(self.matrices))
        return sum(len(self.row(rank, step).neighbours) for step in steps) / len(steps)

    @cached_property
    def rho(self) -> float:
        """``max(|lambda_2|, |lambda_n|)``: by how much one exchange leaves disagreement, in the worst case.

        Where the matrices alternate it is that of their product, per exchange (its root).
        """
        product = np.linalg.multi_dot(self.matrices) if self.changes else self.matrices[0]
        deviation = product - np.full_like(product, 1 / self.size)
        norm = float(np.linalg.norm(deviation, 2))  # of a symmetric matrix the largest eigenvalue's magnitude
        return float((0.0 if norm < 1e-12 else norm) ** (1 / len(self.matrices)))

    @property
    def spectral_gap(self) -> float:
        """``1 - rho``: 1 means that one exchange agrees fully, 0 that the graph falls apart."""
        return 1 - self.rho

    @cached_property
    def mu(self) -> float:
        """``max_{i>=2} |lambda_i - 1|``, which is ``||I - W||_2``; of a topology that does not change."""
        self._only("mu")
        eigenvalues = np.linalg.eigvalsh(self.matrices[0])
        return float(max((abs(value - 1) for value in eigenvalues[:-1]), default=0.0))

    @cached_property
    def connected(self) -> bool:
        """Whether the graph is connected, over a period."""
        reached, frontier = {0}, [0]
        while frontier:
            here = frontier.pop()
            linked = {int(j) for matrix in self.matrices for j in np.flatnonzero(matrix[here])} - reached
            reached |= linked
            frontier += linked
        return len(reached) == self.size

    @property
    def edges(self) -> frozenset[tuple[int, int]]:
        """Every pair that ever exchanges, smaller rank first."""
        pairs = (pair for matrix in self.matrices for pair in np.argwhere(np.triu(matrix, 1)).tolist())
        return frozenset((i, j) for i, j in pairs)

    def _only(self, what: str) -> None:
        if self.changes:
            raise DistcompError(f"{what} is defined for a fixed topology and {self} changes; use a fixed one")

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(b"".join(matrix.tobytes() for matrix in self.matrices)).hexdigest()[:8]

    def __repr__(self) -> str:
        return f"Topology({self.name!r}, size={self.size}, digest={self._digest!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(self._digest)


def metropolis(size: int, edges: EdgeList) -> Matrix:
    """Metropolis-Hastings weights of an undirected graph."""
    adjacent = np.zeros((size, size), dtype=bool)
    for i, j in edges:
        if i == j or not (0 <= i < size and 0 <= j < size):
            raise DistcompError(f"({i}, {j}) links no two of {size} workers; number them 0 to {size - 1}")
        adjacent[i, j] = adjacent[j, i] = True
    degrees = adjacent.sum(axis=1)
    weights = np.where(adjacent, 1.0 / (1 + np.maximum(degrees[:, None], degrees[None, :])), 0.0)
    # The larger degree of both ends: a row never sums to more than 1, and W is symmetric. What is left of a
    # row stays with the worker.
    np.fill_diagonal(weights, 1.0 - weights.sum(axis=1))
    return weights


def ring(size: int) -> Topology:
    """The neighbours of a worker are those before and behind it. Two workers share one edge."""
    return Topology("ring", [metropolis(size, ((i, (i + 1) % size) for i in range(size) if size > 1))])


def torus(size: int, rows: int | None = None) -> Topology:
    """A grid whose ends meet; ``rows`` defaults to the divisor of ``size`` nearest below its root.

    Raises DistcompError where ``size`` has no such grid (a prime makes a ring).
    """
    rows = rows or max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    if size % rows or min(rows, size // rows) < 2:
        raise DistcompError(
            f"{size} workers make no grid of {rows} rows and 2 columns or more; use topology='ring'"
        )
    columns = size // rows
    at = {(r, c): r * columns + c for r in range(rows) for c in range(columns)}
    right = ((here, at[r, (c + 1) % columns]) for (r, c), here in at.items())
    below = ((here, at[(r + 1) % rows, c]) for (r, c), here in at.items())
    return Topology("torus", [metropolis(size, [*right, *below])])


def hypercube(size: int) -> Topology:
    """Workers whose numbers differ in one bit are neighbours. Needs a power of two."""
    bits = _bits(size, "a hypercube")
    edges = ((i, i ^ 1 << b) for b in range(bits) for i in range(size))
    return Topology("hypercube", [metropolis(size, edges)])


def exponential(size: int) -> Topology:
    """The neighbours are 1, 2, 4, 8, ... places away, in both directions: degree about 2 log2 n."""
    hops = [1 << b for b in range(max(1, math.ceil(math.log2(size)))) if size > 1]
    edges = ((i, (i + hop) % size) for hop in hops for i in range(size) if hop % size)
    return Topology("exponential", [metropolis(size, edges)])


def one_peer_exponential(size: int) -> Topology:
    """One neighbour per exchange, 1, 2, 4, ... places away in turn; after log2 n exchanges all agree exactly.

    Source: Ying et al., "Exponential graph is provably efficient", NeurIPS 2021. We differ: their graph is
    directed (one sends to ``i + 2^k`` and receives from ``i - 2^k``); here pairs ``(i, i xor 2^k)`` exchange,
    which averages exactly after as many exchanges and keeps ``W`` symmetric. Needs a power of two.
    """
    bits = _bits(size, "the one-peer exponential graph")
    pairs = ([(i, i ^ 1 << b) for i in range(size)] for b in range(bits))
    return Topology("one_peer_exponential", [metropolis(size, edges) for edges in pairs] or [np.ones((1, 1))])


def star(size: int) -> Topology:
    """Every worker's only neighbour is worker 0."""
    return Topology("star", [metropolis(size, ((0, i) for i in range(1, size)))])


def complete(size: int) -> Topology:
    """All workers are neighbours: each exchange is an average."""
    return Topology("complete", [metropolis(size, ((i, j) for i in range(size) for j in range(i)))])


def random_regular(size: int, degree: int = 4, seed: int = 0) -> Topology:
    """A connected graph drawn at random among those in which everybody has ``degree`` neighbours.

    Pairs ends of edges at random (the configuration model), then swaps ends until no edge is a loop or
    double.
    """
    if not 0 < degree < size or size * degree % 2:
        raise DistcompError(
            f"no graph has {size} workers with {degree} neighbours each; the degree must be below the number "
            "of workers, and their product even"
        )
    generator = np.random.default_rng(seed)
    while True:
        edges = _pair_ends(size, degree, generator)
        topology = Topology("random_regular", [metropolis(size, edges)])
        if degree == 1 or topology.connected:
            return topology


def from_graph(graph: Any) -> Topology:
    """The topology of an undirected networkx graph. Workers are numbered in the order of its sorted nodes."""
    if getattr(graph, "is_directed", lambda: False)():
        raise DistcompError("gossip needs an undirected graph; use graph.to_undirected()")
    number = {node: rank for rank, node in enumerate(sorted(graph.nodes))}
    edges = [(number[a], number[b]) for a, b in graph.edges if a != b]
    return Topology("graph", [metropolis(len(number), edges)])


TOPOLOGIES: dict[str, Callable[[int], Topology]] = {
    "ring": ring,
    "torus": torus,
    "hypercube": hypercube,
    "exponential": exponential,
    "one_peer_exponential": one_peer_exponential,
    "star": star,
    "complete": complete,
    "random_regular": random_regular,
}


@lru_cache
def resolve(topology: str | Topology, size: int) -> Topology:
    """The topology that a setting means for ``size`` workers.

    Raises DistcompError for an unknown name, a topology of another size, or a graph that is not connected.
    """
    made = _named(topology, size) if isinstance(topology, str) else topology
    if made.size != size:
        raise DistcompError(f"{made} is for {made.size} workers and there are {size}; make one for {size}")
    if not made.connected:
        raise DistcompError(f"{made} falls apart into pieces that never exchange; connect them")
    return made


def check_name(name: str) -> None:
    """Raise DistcompError unless there is a topology of that name."""
    if name not in TOPOLOGIES:
        known = ", ".join(TOPOLOGIES)
        raise DistcompError(f"there is no topology {name[:80]!r}; use one of {known}, or a Topology")


def _named(name: str, size: int) -> Topology:
    check_name(name)
    return TOPOLOGIES[name](size)


def _pair_ends(size: int, degree: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    ends = generator.permutation(np.repeat(np.arange(size), degree)).reshape(-1, 2)
    while True:
        seen: set[tuple[int, int]] = set()
        bad = []
        for index, (a, b) in enumerate(ends.tolist()):
            pair = (min(a, b), max(a, b))
            if a == b or pair in seen:
                bad.append(index)
            seen.add(pair)
        if not bad:
            return [(int(a), int(b)) for a, b in ends]
        for index in bad:
            other = int(generator.integers(len(ends)))
            ends[index, 1], ends[other, 1] = ends[other, 1], ends[index, 1]


def _bits(size: int, what: str) -> int:
    bits = size.bit_length() - 1
    if size != 1 << bits:
        raise DistcompError(f"{what} needs a power of two, not {size} workers; use topology='exponential'")
    return bits


def _check(name: str, matrix: Matrix) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise DistcompError(f"the mixing matrix of {name!r} is not square; give one row per worker")
    if not np.allclose(matrix, matrix.T) or not np.allclose(matrix.sum(axis=1), 1) or matrix.min() < 0:
        raise DistcompError(
            f"the mixing matrix of {name!r} is not symmetric with non-negative rows that sum to 1; "
            "distcomp.averaging.topology.metropolis(size, edges) makes one"
        )
