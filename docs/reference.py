"""A page for each public function and class, and one for each room that lists them: read from ``__all__``,
or, in the modules below, from the names without an underscore. Sphinx's autodoc writes what is on a page."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import distcomp

SOURCES = Path(distcomp.__file__).parent
MODULES = (
    "active", "errors", "horovod", "layout", "payload", "randomness", "recording", "schedule",
    "integrations.accelerate", "integrations.aim", "integrations.fabric", "integrations.files",
    "integrations.fsdp2", "integrations.lightning", "integrations.mlflow", "integrations.prometheus",
    "integrations.ray", "integrations.tensorboard", "integrations.torchtitan", "integrations.trackio",
    "integrations.transformers", "integrations.wandb",
)  # fmt: skip
"""Modules without ``__all__`` that the pages tell people to import. Some need a library that is not there."""

HEAD = """\
# Reference

Every public function and class, with its signature and types. What stands in no `__all__` and in none of
these modules is private and may change in any version ([versions](versions.md)).

| from | there is |
|---|---|
"""


@dataclass(frozen=True)
class Name:
    """A public name, where it is imported from, and what it is."""

    module: str
    name: str
    kind: str
    """``class``, ``function`` or ``data``."""
    summary: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


def packages() -> list[str]:
    """Every package that promises names, ``distcomp`` itself last: what a room has is the room's."""
    found = [one.name for one in pkgutil.walk_packages(distcomp.__path__, "distcomp.") if one.ispkg]
    return [name for name in [*found, "distcomp"] if hasattr(importlib.import_module(name), "__all__")]


@lru_cache(maxsize=1)
def names() -> dict[str, list[Name]]:
    """Module -> its public names."""
    promised = {package: sorted(_promised(package), key=_order) for package in packages()}
    written = {f"distcomp.{module}": list(_written(f"distcomp.{module}")) for module in MODULES}
    return promised | written


def pages() -> dict[str, str]:
    """Path under ``docs`` -> Markdown."""
    found = names()
    homes = _homes(found)
    made = {"reference.md": _index(found)}
    for module, here in found.items():
        made[f"reference/{module}.md"] = _room(module, here, homes)
        made |= {f"reference/{one.path}.md": _page(one) for one in here if homes[_identity(one)] == one}
    return made


def write(docs: Path) -> None:
    """Write the pages that changed, and take away those of names that are gone."""
    made = pages()
    (docs / "reference").mkdir(exist_ok=True)
    for path in (docs / "reference").glob("*.md"):
        if f"reference/{path.name}" not in made:
            path.unlink()
    for name, text in made.items():
        path = docs / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def home_of(target: str) -> str | None:
    """The page of what a docstring or a signature calls by any of its names, its last one deciding."""
    return _by_last_name().get(target.rpartition(".")[2])


@lru_cache(maxsize=1)
def _by_last_name() -> dict[str, str]:
    homes = _homes(names()).values()
    return {one.name: f"reference/{one.path}" for one in reversed(list(homes))}


def _order(one: Name) -> tuple[str, str]:
    return one.name.lower(), one.name


def _promised(package: str) -> Iterator[Name]:
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = (
            inspect.unwrap(getattr(module, name))
            if callable(getattr(module, name))
            else getattr(module, name)
        )
        kind = "class" if inspect.isclass(thing) else "function" if inspect.isfunction(thing) else "data"
        doc = inspect.getdoc(thing) if kind != "data" else _told_of_data(package, name)
        yield Name(package, name, kind, _first(doc))


def _written(module: str) -> Iterator[Name]:
    """Read, not imported: it may need a library that is not installed."""
    tree = ast.parse((SOURCES.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield Name(module, node.name, kind, _first(ast.get_docstring(node)))


def _told_of_data(package: str, name: str) -> str:
    """The text under an assignment, wherever in the package that is."""
    folder = SOURCES.parent / package.replace(".", "/")
    for path in sorted(folder.rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in pairwise(body):
            targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
            if not any(getattr(target, "id", None) == name for target in targets):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return str(after.value.value)
    return ""


def _first(doc: str | None) -> str:
    """The first sentence, on one line."""
    text = " ".join((doc or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z])|::$", text)[0].rstrip(":")


def _identity(one: Name) -> Any:
    """Two names of one thing have one page."""
    if one.module.removeprefix("distcomp.") in MODULES or one.kind == "data":
        return one.path
    return id(getattr(importlib.import_module(one.module), one.name))


def _homes(found: dict[str, list[Name]]) -> dict[Any, Name]:
    """The first room that has a thing keeps its page; modules without ``__all__`` come after."""
    homes: dict[Any, Name] = {}
    for here in found.values():
        for one in here:
            homes.setdefault(_identity(one), one)
    return homes


def _index(found: dict[str, list[Name]]) -> str:
    rows = "\n".join(
        f"| [`{module}`](reference/{module}.md) | {len(here)} names |" for module, here in found.items()
    )
    tree = "\n".join(f"reference/{module}" for module in found)
    return f"{HEAD}{rows}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def _room(module: str, here: list[Name], homes: dict[Any, Name]) -> str:
    rows = [
        f"| [`{one.name}`]({homes[_identity(one)].path}.md) | {one.kind} | {_cell(one.summary)} |"
        for one in here
    ]
    return "\n".join([f"# {module}", "", "| name | is a | what it is |", "|---|---|---|", *rows, ""])


def _page(one: Name) -> str:
    lines = [
        "---",
        "orphan: true",
        "---",
        "",
        f"# {one.name}",
        "",
        f"In [`{one.module}`]({one.module}.md).",
        "",
    ]
    if one.kind == "data":
        value = repr(getattr(importlib.import_module(one.module), one.name))
        shown = value if len(value) < 200 else f"{value[:60]} ..."
        return "\n".join([*lines, "```python", f"{one.name} = {shown}", "```", "", _cell(one.summary), ""])
    options = (
        "   :members:\n   :special-members: __call__\n   :show-inheritance:\n" if one.kind == "class" else ""
    )
    return "\n".join([*lines, "```{eval-rst}", f".. auto{one.kind}:: {one.path}", f"{options}```", ""])


def _cell(text: str) -> str:
    """reStructuredText as a cell of a table in Markdown."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*_<$])", r"\\\1", part) for i, part in enumerate(parts))


def as_restructured(lines: list[str]) -> list[str]:
    """A docstring as Sphinx is to read it: outside of code a sign is only a sign."""
    out: list[str] = []
    prose: list[str] = []
    deeper: int | None = None
    for line in [*lines, ""]:
        indent = len(line) - len(line.lstrip())
        if deeper is not None and (not line.strip() or indent > deeper):
            out.append(line)
            continue
        if deeper is not None or line.lstrip().startswith(">>>"):
            deeper = None
        if line.lstrip().startswith(">>>"):
            out += [*_escaped(prose), line]
            prose = []
            continue
        prose.append(line)
        if line.rstrip().endswith("::"):
            out += _escaped(prose)
            prose, deeper = [], indent
    return [*out, *_escaped(prose)]


CODE = re.compile(r"(``.+?``|:\w+:`[^`]*`)", re.DOTALL)


def _escaped(lines: list[str]) -> list[str]:
    parts = CODE.split("\n".join(lines))
    parts[::2] = [re.sub(r"(?<!\\)([*|`])|(?<=\w)(_)(?!\w)", r"\\\1\2", part) for part in parts[::2]]
    return _listed("".join(parts).split("\n")) if lines else []


ITEM = re.compile(r"(\w[\w, ]*): (.*)")


def _listed(lines: list[str]) -> list[str]:
    """What stands further in under ``Args:``, ``Raises:`` and the like, as a list of what is named there."""
    out: list[str] = []
    heading: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if heading is None or not line.strip() or indent <= heading:
            if heading is not None and line.strip():
                out.append("")
            head = line.rstrip()
            heading = indent if head.endswith(":") and not head.endswith("::") else None
            out.append(line)
            continue
        item = ITEM.fullmatch(line.strip()) if indent == heading + 4 else None
        if item is not None:
            out += ["", f"{' ' * heading}* ``{item[1]}``: {item[2]}"]
        elif out[-1].rstrip().endswith(":") and "* ``" not in out[-1]:
            out += ["", f"{' ' * heading}* {line.strip()}"]
        else:
            out[-1] += f" {line.strip()}"
    return out
