"""Imports point down the list of rooms, and few of them know torch.distributed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
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
    "calls",
    "attaching",
    "cli",
    "integrations",
    "network",
    "report",
    "updates",
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


KNOWS_IT_AS_A_RANK = PACKAGE / "advice" / "script.py"
"""Runs somebody's training script as a rank of its own."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_transports_and_what_serves_them_know_torch_distributed(file: Path) -> None:
    names = list(imports(file))
    assert not any(name.startswith("torch.distributed") for name in names) or (
        room_of(file) in MAY_KNOW_TORCH_DISTRIBUTED or file == KNOWS_IT_AS_A_RANK
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


def layers() -> dict[str, int]:
    """The floor of each room in the contract, counted from the top."""
    (contract,) = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    floors = [re.findall(r"\w+", floor) for floor in contract["layers"]]
    return {room: number for number, rooms in enumerate(floors) for room in rooms}


def dynamic_imports(file: Path) -> Iterator[str]:
    """What a file imports by a string. Where the string is worked out, every string in the file that begins
    like one of our modules is taken for it."""
    tree = ast.parse(file.read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called in ("import_module", "__import__", "require", "reload"):
            given = call.args[0]
            known = isinstance(given, ast.Constant)
            texts = [given] if known else [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            yield from (str(text.value) for text in texts if str(text.value).startswith("distcomp.") or known)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_by_a_string_point_down_the_contract_too(file: Path) -> None:
    floors, own = layers(), room_of(file)
    if own in ("__init__", "__main__"):  # the roof: it brings everything, when it is asked for
        return
    for name in dynamic_imports(file):
        root, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if root == "distcomp" and room != own:
            assert floors[room] > floors[own], f"{file.name} imports {name} by a string"


def test_an_import_by_a_string_is_seen_however_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "from importlib import import_module\nimport importlib\n"
        "import_module('distcomp.cli')\n__import__('distcomp.advice')\nrequire('numpy', 'all')\n"
        "def f(name): return importlib.import_module(f'distcomp.sync.{name}')\n"
    )
    assert {"distcomp.cli", "distcomp.advice", "numpy", "distcomp.sync."} <= set(dynamic_imports(file))
    found = {
        file.name for file in FILES if any(name.startswith("distcomp.") for name in dynamic_imports(file))
    }
    assert {"__init__.py", "dispatch.py"} <= found


def test_no_file_of_the_package_is_in_a_circle() -> None:
    """Imports of every kind, those by a string included; the roof apart, and what a room loads of its own."""
    modules = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in FILES}
    edges: dict[str, set[str]] = {}
    for module, file in modules.items():
        roof = module in ("__init__", "__main__")
        elsewhere = [name for name in dynamic_imports(file) if name.split(".")[1:2] != [room_of(file)]]
        names = [] if roof else [*static_imports(file), *elsewhere]
        edges[module] = {found for name in names for found in files_of(name, modules.keys())}
    assert circles(edges) == []


def files_of(name: str, modules: Collection[str]) -> list[str]:
    """The module of ours that brings a name: the name itself, or what it is an attribute of. Of a name whose
    end is worked out, ``distcomp.kernels.``, every module it may be."""
    root, _, inside = name.partition(".")
    if root != "distcomp":
        return []
    if inside.endswith("."):
        return [one for one in modules if one.startswith(inside) and not one.endswith("__init__")]
    room = inside.rpartition(".")[0]
    candidates = [inside, f"{inside}.__init__", room, f"{room}.__init__"]
    return [one for one in candidates if one in modules][:1]


def static_imports(file: Path) -> Iterator[str]:
    """Of names, when the file is executed: neither inside of functions nor for type checkers alone."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(edges: dict[str, set[str]]) -> list[str]:
    """The modules from which a way leads back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in edges[left.pop()] - seen:
                seen.add(target)
                left.append(target)
        return seen

    return [module for module in edges if module in reached(module)]


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


FIRST = """
import os, sys, torch, torch.distributed
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
            os._exit(0)
        except BaseException as error:
            print(module, type(error).__name__, error, flush=True)
            os._exit(1)
    os.waitpid(child, 0)
"""


ROOMS_AND_HEARTS = [
    "advice", "attaching.ddp", "attaching.session", "averaging", "calls", "cli", "collectives", "compressors",
    "kernels", "methods", "network", "parametrize", "precision", "pruning", "runtime.channel",
]  # fmt: skip


def test_every_room_may_be_imported_first() -> None:
    """No import waits for another one to have been made before."""
    modules = [f"distcomp.{name}" for name in ROOMS_AND_HEARTS]
    done = subprocess.run([sys.executable, "-c", FIRST, *modules], capture_output=True, text=True, check=True)
    assert done.stdout == ""
