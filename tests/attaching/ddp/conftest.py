"""What the tests of attached DDP models share."""

from collections.abc import Callable, Iterator

import pytest

from tests.cluster import Cluster


@pytest.fixture
def doomed() -> Iterator[Callable[[int], Cluster]]:
    """``doomed(n)``: a cluster that the test may break."""
    clusters: list[Cluster] = []

    def make(size: int) -> Cluster:
        clusters.append(Cluster(size))
        return clusters[-1]

    yield make
    for one in clusters:
        one.close()
