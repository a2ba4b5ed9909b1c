"""The names a package promises are there, once, and told in a docstring."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import distcomp


def promising() -> list[ModuleType]:
    """Every package of distcomp that has an ``__all__``."""
    packages = [one.name for one in pkgutil.walk_packages(distcomp.__path__, "distcomp.") if one.ispkg]
    modules = [distcomp, *(importlib.import_module(name) for name in packages)]
    return [module for module in modules if hasattr(module, "__all__")]


@pytest.mark.parametrize("package", promising(), ids=lambda package: package.__name__)
def test_all_is_true(package: ModuleType) -> None:
    names = package.__all__
    assert [name for name in names if not hasattr(package, name)] == []
    assert len(names) == len(set(names))


@pytest.mark.parametrize("package", promising(), ids=lambda package: package.__name__)
def test_what_is_public_says_what_it_is(package: ModuleType) -> None:
    """A docstring of its own: dataclasses would otherwise show their signature for one."""
    things = [(name, getattr(package, name)) for name in package.__all__]
    told = [(name, thing) for name, thing in things if inspect.isclass(thing) or inspect.isfunction(thing)]
    silent = [n for n, thing in told if not thing.__doc__ or thing.__doc__.startswith(f"{thing.__name__}(")]
    assert silent == []


MOST_NAMES = 45


def test_the_top_has_few_names_and_they_are_there_before_any_is_used() -> None:
    assert len(distcomp.__all__) <= MOST_NAMES
    program = "import distcomp; print(*dir(distcomp))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {*distcomp.__all__, *distcomp.ROOMS} <= set(done.stdout.split())


@pytest.mark.parametrize("room", distcomp.ROOMS)
def test_a_room_is_an_attribute_once_distcomp_is_imported(room: str) -> None:
    program = f"import distcomp; print(distcomp.{room}.__all__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) > 3


def test_a_name_that_is_in_a_room_is_said_to_be_there() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'nuqsgd'; it is distcomp\.methods\.nuqsgd"):
        distcomp.nuqsgd  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nosuch'$"):
        distcomp.nosuch  # noqa: B018


def test_what_a_type_checker_is_told_is_what_is_there() -> None:
    """The imports that only a type checker sees bring each public name, from where it really is."""
    tree = ast.parse(Path(distcomp.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    told = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        told |= {alias.asname: (node.module, alias.name) for alias in node.names}
    assert set(told) == {*distcomp.__all__, *distcomp.ROOMS}
    for public, (module, name) in told.items():
        there = importlib.import_module(module)
        inside = getattr(there, name) if hasattr(there, name) else importlib.import_module(f"{module}.{name}")
        assert getattr(distcomp, public) is inside


def test_mypy_knows_the_names_and_their_settings(tmp_path: Path) -> None:
    lines = {
        "distcomp.nosuch()": "has no attribute",
        "distcomp.qsgd(bit=4)": "Unexpected keyword argument",
        "distcomp.methods.powersgd(rnk=1)": "Unexpected keyword argument",
        "distcomp.qsgd(bits=4)": "",
        "distcomp.averaging.ecd(bits=6)": "",
    }
    file = tmp_path / "script.py"
    file.write_text("import distcomp\n" + "\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--follow-imports=silent",
        str(file),
    ]
    # Of an editable installation mypy finds nothing: Python finds it by a hook.
    environ = {**os.environ, "MYPYPATH": str(Path(distcomp.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ)
    for number, (line, error) in enumerate(lines.items(), start=2):
        told = [one for one in done.stdout.splitlines() if f"script.py:{number}: error" in one]
        assert (error in told[0]) if error else not told, f"{line}: {done.stdout}{done.stderr}"
