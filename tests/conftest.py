"""What every test shares: one thread, the same examples every time, ranks of their own, no file left out."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from distcomp.registry import load_all
from tests.cluster import Cluster

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too: two of them run side by side
# A rendezvous store's host asks the name server who connects: one that is silent costs 10 s by default.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
load_all()  # METHODS knows them all

settings.register_profile(
    "distcomp",
    deadline=None,  # the machine may be busy; no test asserts a time
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("distcomp")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Callable[[int], Cluster]]:
    """``cluster(n)``: n ranks that are up already, made anew if a job has broken them."""
    made: dict[int, Cluster] = {}

    def get(size: int) -> Cluster:
        if size not in made or not made[size].usable:
            made[size] = Cluster(size)
        return made[size]

    yield get
    for ranks in made.values():
        ranks.close()


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """A test that leaves a variable or a folder of modules behind fails itself, not one that runs later."""
    variables, folders = _variables(), list(sys.path)
    yield
    changed = dict(variables.items() ^ _variables().items())
    added = [folder for folder in sys.path if folder not in folders]
    for name in changed:
        os.environ.pop(name, None)
    os.environ.update({name: variables[name] for name in changed if name in variables})
    sys.path[:] = folders
    assert (changed, added) == ({}, []), "put back what was changed, by monkeypatch"


def _variables() -> dict[str, str]:
    """Those of the environment that lead a later test astray."""
    ours = ("DISTCOMP", "PYTHONPATH", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "PMI_", "SLURM_")
    return {name: value for name, value in os.environ.items() if name.startswith(ours)}


BUILT_ELSEWHERE = {
    "tests/distill/test_torchdistill.py": "torchdistill asks for torchvision, which CPU builds of torch lack",
    "tests/horovod_job/test_horovod.py": "Horovod is built by scripts/test-horovod",
    "tests/integrations/test_ray.py": "Ray is installed by its users",
    "tests/integrations/test_trackers.py": "trackers are installed by scripts/test-trackers",
    "tests/updates/test_trl.py": "TRL is installed by its users",
}
"""Files that may be skipped whole in continuous integration, and why."""

_run: Counter[str] = Counter()
_skipped: Counter[str] = Counter()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped[report.nodeid] += 1


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    if report.skipped:
        _skipped[file] += 1
    elif report.when == "call":
        _run[file] += 1


def left_out(run: Counter[str], skipped: Counter[str]) -> list[str]:
    """The files of which every test was skipped, though none of them may be."""
    whole = (file for file in skipped if not run[file] and file not in BUILT_ELSEWHERE)
    return sorted(file for file in whole if Path(file).name.startswith("test_"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In continuous integration a file that was skipped whole fails: what it needs was not installed."""
    if os.environ.get("CI") and session.exitstatus == 0 and left_out(_run, _skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI"):
        for file in left_out(_run, _skipped):
            terminalreporter.write_line(
                f"{file} was skipped whole; install what it needs, or name it in conftest"
            )
