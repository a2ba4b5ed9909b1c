from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster import Cluster


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """``ranks(job, *arguments)`` on two new processes: what a trainer keeps in its globals dies with them."""
    cluster = Cluster(2, patience_s=600.0)  # a job's first act is to import a trainer
    yield cluster.run
    cluster.close()
