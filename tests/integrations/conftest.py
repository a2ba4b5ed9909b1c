import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "ddp"))

from cluster import Cluster
from clusters import cluster as cluster


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """``ranks(job, *arguments)`` on two new processes: what a trainer keeps in its globals dies with them."""
    cluster = Cluster(2, patience_s=600.0)  # a job's first act is to import a trainer
    yield cluster.run
    cluster.close()
