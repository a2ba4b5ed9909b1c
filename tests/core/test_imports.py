"""Imports point down the list of rooms, and only transports and attaching know torch.distributed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distcomp

PACKAGE = Path(distcomp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS = [
    {"cli"},
    {"integrations"},
    {"advice"},
    {"attaching"},
    {"averaging"},
    {"transports"},
    {"runtime"},
    {"precision", "pruning"},
    {"methods"},
    {"compressors"},
    {"kernels"},
    {"parametrize", "training"},
    {"errors"},
]
"""From the top. A room may import from rooms below its own; those not listed are free of this order."""

MAY_KNOW_TORCH_DISTRIBUTED = (
    "transports",
    "attaching",
    "public",
    "cli",
    "integrations",
    "network",
    "report",
)

MAY_KNOW_ITS_WRAPPER = (*MAY_KNOW_TORCH_DISTRIBUTED, "parametrize", "pruning", "advice", "training")
"""Parametrizations, pruners, calibration and the training clock are given models that
DistributedDataParallel is around; they say nothing on the wire themselves."""


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Full names of what a file imports or reaches as an attribute, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_transports_and_what_serves_them_know_torch_distributed(file: Path) -> None:
    names = list(imports(file))
    assert not any(name.startswith("torch.distributed") for name in names) or (
        room_of(file) in MAY_KNOW_TORCH_DISTRIBUTED
    )
    assert not any(name.startswith("torch.nn.parallel") for name in names) or (
        room_of(file) in MAY_KNOW_ITS_WRAPPER
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down_the_list_of_rooms(file: Path) -> None:
    rank = {room: index for index, rooms in enumerate(ROOMS) for room in rooms}
    if room_of(file) not in rank:
        return
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "distcomp" and len(parts) > 1 and parts[1] in rank and parts[1] != room_of(file):
            assert rank[parts[1]] > rank[room_of(file)], f"{file.name} imports {name}"


def test_the_test_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from torch import distributed\n    torch.distributed.get_rank()\n")
    assert {"torch.distributed", "torch.distributed.get_rank"} <= set(imports(file))


def test_the_core_needs_torch_and_numpy_alone() -> None:
    """Optional packages are imported when they are needed, not with distcomp."""
    extras = ["rich", "sklearn", "matplotlib", "mpi4py", "horovod", "lightning", "transformers", "pyroute2"]
    code = f"import sys, distcomp; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
