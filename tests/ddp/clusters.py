"""The fixture of every folder whose tests run on real processes."""

from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Callable[[int], Cluster]]:
    """``cluster(n)``: n ranks that are up already, made anew if a job has broken them."""
    made: dict[int, Cluster] = {}

    def get(size: int) -> Cluster:
        if size not in made or not made[size].usable:
            made[size] = Cluster(size)
        return made[size]

    yield get
    for one in made.values():
        one.close()
