"""Methods of somebody else's: entry points of installed packages, and modules or files that are named.

A package that brings methods says so in its metadata, and importing the module registers them::

    [options.entry_points]
    distcomp_methods =
        mine = my_package.methods

A file that is not installed is named on the command line, ``--import my_methods.py`` (or a module's name), or
in the environment, ``DISTCOMP_IMPORT``, several with commas between.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from distcomp.errors import DistcompError
from distcomp.registry import find

GROUP = "distcomp_methods"
IMPORT = "DISTCOMP_IMPORT"

Found = TypeVar("Found")


def load_plugins() -> None:
    """Import all of them; those that are there already are not imported again.

    Raises DistcompError for one that cannot be imported.
    """
    for entry in _installed(tuple(sys.path)):
        _import(entry.value.partition(":")[0], f"the entry point {entry.name} of {GROUP}")
    for named in filter(None, (part.strip() for part in os.environ.get(IMPORT, "").split(","))):
        _import(named, IMPORT)


@functools.cache
def _installed(path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    """Looked for once on each path: opening the metadata of every package takes milliseconds, and a name that
    is in one table alone is looked up in both, also in each call that names a codec."""
    return tuple(metadata.entry_points(group=GROUP))


def lookup(table: Mapping[str, Found], name: str) -> Found | None:
    """The entry of a name, or None; brings in what others have brought before it gives up."""
    if find(table, name) is None:
        load_plugins()
    return table.get(name)


def name_in_environment(named: Sequence[str], beside: Path | None = None) -> None:
    """Put what ``--import`` names into this process's environment, which its children inherit, and import it.

    Files become absolute; modules are looked for in the current directory and ``beside`` a script, too.
    """
    for folder in (Path.cwd(), *([beside.resolve()] if beside is not None else [])):
        if named and str(folder) not in sys.path:
            sys.path.append(str(folder))
    given = [name.strip() for part in named for name in part.split(",") if name.strip()]
    absolute = [str(Path(name).resolve()) if _is_file(name) else _as_file(name) for name in given]
    before = [os.environ[IMPORT]] if os.environ.get(IMPORT) else []
    for module in absolute:
        _import(module, "--import")
    if absolute:
        os.environ[IMPORT] = ",".join([*before, *absolute])
    load_plugins()


def _is_file(named: str) -> bool:
    return named.endswith(".py")


def _as_file(module: str) -> str:
    """A module that is one file beside the script or here, as that file: the ranks have other directories."""
    path = Path.cwd() / f"{module}.py"
    return str(path) if path.is_file() else module


def _import(named: str, source: str) -> None:
    try:
        if _is_file(named):
            _import_file(Path(named))
        else:
            importlib.import_module(named)
    except Exception as error:  # whatever the module does when it is imported
        raise DistcompError(
            f"{source} names {named}, which cannot be imported ({type(error).__name__}: {error}); mend it, "
            "or leave it out"
        ) from error


def _import_file(path: Path) -> None:
    """Import a file as the module that a script beside it would import, so that there is one of it."""
    if path.stem in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
