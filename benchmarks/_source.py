"""The package's source as data: its modules, and which imports which. Nothing of it is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """One file of the package, by its dotted name."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")


class Package:
    """The package of a checkout."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.above = checkout / "src" if (checkout / "src" / "distcomp").is_dir() else checkout
        root = self.above / "distcomp"
        if not root.is_dir():
            raise SystemExit(f"{checkout} holds no src/distcomp/ and no distcomp/; name a checkout")
        self.modules = [Module(_dotted(path, self.above), path) for path in sorted(root.rglob("*.py"))]
        self.names = {module.name for module in self.modules}
        self.native = sorted(path for end in ("*.c", "*.h") for path in root.rglob(end))


def _dotted(path: Path, above: Path) -> str:
    parts = path.relative_to(above).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: Module, package: Package) -> Iterator[tuple[str, bool]]:
    """The package's modules that a module imports when it runs, wherever in the file, and whether by a
    string.

    What only a type checker reads is left out.
    """
    for node in running(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _known(alias.name, package, by_string=False)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module)
            for alias in node.names:
                yield from _known(f"{base}.{alias.name}", package, by_string=False)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in package.names and node.value != "distcomp":
                yield node.value, True
        elif dynamic(node):
            yield from ((name, True) for name in _formatted(node, package))


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, but those under ``if TYPE_CHECKING`` (its ``else`` runs)."""
    yield tree
    children = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        children = iter(tree.orelse)
    for child in children:
        yield from running(child)


def absolute(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    if module.path.name != "__init__.py":
        parts = parts[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _known(name: str, package: Package, by_string: bool) -> Iterator[tuple[str, bool]]:
    """The longest beginning of a dotted name that is a module of the package."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (beginning := ".".join(parts[:end])) in package.names:
            yield beginning, by_string
            return


def dynamic(node: ast.AST) -> bool:
    """Whether a node imports by a string."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "importlib.import_module", "import_module", "__import__", "optional", "needed",
    )  # fmt: skip


def _formatted(node: ast.AST, package: Package) -> Iterator[str]:
    """Modules that an f-string such as ``f"distcomp.kernels.{name}"`` can mean."""
    assert isinstance(node, ast.Call)
    for argument in node.args[:1]:
        if isinstance(argument, ast.JoinedStr):
            pattern = "".join(
                re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+"
                for part in argument.values
            )
            yield from (name for name in package.names if re.fullmatch(pattern, name))


def edges(package: Package, strings: bool = True) -> dict[str, set[str]]:
    """Module -> the package's modules that it imports. ``strings``: those that it names in a string, too."""
    return {
        module.name: {
            name
            for name, by_string in imported(module, package)
            if name != module.name and (strings or not by_string)
        }
        for module in package.modules
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node, largest first (Tarjan, without recursion)."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_nodes: list[str] = []
    for start in graph:
        if start in number:
            continue
        number[start] = lowest[start] = len(number)
        open_nodes.append(start)
        work = [(start, iter(sorted(graph[start])))]
        while work:
            node, successors = work[-1]
            following = next(successors, None)
            if following is None:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == number[node]:
                    at = open_nodes.index(node)
                    found.append(sorted(open_nodes[at:]))
                    del open_nodes[at:]
            elif following not in number:
                number[following] = lowest[following] = len(number)
                open_nodes.append(following)
                work.append((following, iter(sorted(graph[following]))))
            elif following in open_nodes:
                lowest[node] = min(lowest[node], number[following])
    return sorted((circle for circle in found if len(circle) > 1), key=len, reverse=True)
