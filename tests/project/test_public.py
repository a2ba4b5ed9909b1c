"""The names a package promises are there, once, and told in a docstring."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import distcomp
from distcomp.methods import METHODS


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


def test_every_method_is_a_name_of_distcomp() -> None:
    assert [name for name in METHODS if METHODS[name].recipe not in vars(distcomp).values()] == []
    assert [name for name in METHODS if name not in distcomp.__all__] == []
