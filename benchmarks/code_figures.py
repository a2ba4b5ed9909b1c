"""Figures of the code itself: how long, how explained, how tangled, in which words. Read from the source.

    python -m benchmarks.code_figures                            # of this checkout, as JSON
    python -m benchmarks.code_figures ../old --write figures.json
    python -m benchmarks.code_figures --table OLD.json           # this checkout beside an older one
    python -m benchmarks.code_figures --page                     # docs/decisions/rebuild.md, from the results

Works on a checkout whose package lies in ``src/distcomp/`` or in ``distcomp/``. Nothing of it is run,
but for the number of public names, which is asked of ``distcomp.__all__``.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._places import ROOT
from benchmarks._source import Module, Package, absolute, circles, dynamic, edges
from benchmarks._tables import fill, result

PAGE = ROOT / "docs" / "decisions" / "rebuild.md"

LONG = 60
"""Lines of a function, docstring included, above which it is listed."""

OLD_WORDS = [
    "talk", "Talk", "Turn", "Moment", "Outcome", "Sum", "Gather", "Swap", "Mix", "lift", "Cheapest",
    "Choose", "apart", "joined", "parted", "Slab", "Segment", "grain", "Seal", "YARDSTICK", "owed",
    "deduct", "transparent", "SharedRange", "Rotate", "ToOwners", "OnGrid", "Silence", "Lane",
    "Trampoline", "Link", "Track", "Landing", "carry", "slots", "ShardSync", "ModelSync", "StockSync",
    "Levels", "Edges", "Direct", "Liveness", "launched", "place", "holder", "wiretest", "boot",
    "letters", "asks", "rehearse", "Problem", "Excess", "crowd", "late", "arriving", "leaving",
    "resting", "Widths", "living", "dead", "through", "holds", "bake", "View", "law", "told", "fails",
    "differs", "one", "found",
]  # fmt: skip
"""Words that the field has others for, as they stood when the words were counted first."""

SAME_MEANING = {
    "distcomp.kernels": "one kernel, by each of its back ends and by the dispatcher that chooses",
    "distcomp.cli": "add a command's options, run it, plot what it found",
    "distcomp.integrations": "attach, save and load, as each trainer spells them",
}
"""Rooms whose modules answer alike: a name that several of them define is one interface, one meaning."""

SAME_WORD = {
    "apply": "what was worked out before, to a model: removals, or an update of its weights",
    "attach": "compression to a model: of one's own loop, or of a trainer's",
    "encode": "as bytes: symbols, or what turns one version of a model into the next",
    "decode": "bytes back into what was encoded: symbols, or the numbers of a format",
    "fixed_point": "the format Q(I).(F): of a layer's numbers, of a message's",
    "gradual": "a part of the weights at a time: quantized, or pruned",
    "materialize": "a parametrization into a plain weight: of all kinds, or of masks alone",
    "register": "under a name: a method, a backend of torch.distributed",
    "summary": "what a model's numbers cost: how wide, or how few they are",
    "remove": "a parametrization from a weight: of all kinds, or quantizers alone",
}
"""Public names of two rooms that say the same of two things, as English does."""

REQUESTS = ("Request", "Collective")
"""What the union of all requests may be called."""


# --- Text ---


def long_functions(package: Package) -> dict[str, int]:
    return {
        f"{module.name}.{node.name}": lines
        for module in package.modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONG
    }


def comment_lines(module: Module) -> int:
    """Lines on which a comment stands that is written for a reader: no ``noqa``, ``type:`` or ``fmt:``."""
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    for_tools = re.compile(r"#\s*(noqa|type:|fmt:|pragma|ruff|!)")
    return sum(token.type == tokenize.COMMENT and not for_tools.match(token.string) for token in tokens)


def docstring_lines(module: Module) -> int:
    """Lines of strings that are statements of their own: docstrings, and those below a field."""
    return sum(
        (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def identifiers(module: Module) -> Iterator[str]:
    """Every name that a module defines or uses, as often as it does, and the module's own."""
    yield module.name.rpartition(".")[2]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).rpartition(".")[2]


def twice_defined(package: Package) -> dict[str, list[str]]:
    """Public classes, functions and names of types that more than one module defines."""
    where: dict[str, list[str]] = {}
    for module in package.modules:
        for node in module.tree.body:
            for name in _public_names_of(node):
                where.setdefault(name, []).append(module.name)
    return {name: modules for name, modules in sorted(where.items()) if len(modules) > 1 and name != "main"}


def _public_names_of(node: ast.stmt) -> Iterator[str]:
    """What a statement defines for others. Constants are their module's own, and so are type variables."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign) and "TypeVar(" not in ast.unparse(node):
        names = (ast.unparse(target) for target in _targets(node))
        yield from (name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name))


def two_meanings(package: Package) -> dict[str, list[str]]:
    """Public names that mean two things: defined twice, and neither in the modules of one interface
    (:data:`SAME_MEANING`) nor one word for one thing (:data:`SAME_WORD`)."""
    return {
        name: modules
        for name, modules in twice_defined(package).items()
        if name not in SAME_WORD and len({_interface(module) for module in modules}) > 1
    }


def _interface(module: str) -> str:
    return next((room for room in SAME_MEANING if f"{module}.".startswith(f"{room}.")), module)


# --- Types and torch ---


def request_types(package: Package) -> dict[str, str]:
    """Name -> module of each request: what the union of all of them is made of."""
    for module in package.modules:
        for node in module.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                names = [ast.unparse(part) for part in _targets(node)]
                if set(names) & set(REQUESTS) and isinstance(node.value, ast.BinOp):
                    return {part.strip(): module.name for part in ast.unparse(node.value).split("|")}
    return {}


def _targets(node: ast.Assign | ast.AnnAssign) -> Sequence[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def request_checks(package: Package) -> tuple[int, list[str]]:
    """How many ``isinstance`` name a request type, and the functions in which two or more of them stand."""
    kinds = request_types(package)
    checks, ladders = 0, []
    for module in package.modules:
        here = {
            alias.asname or alias.name
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.name in kinds and absolute(node, module) in (kinds[alias.name], "distcomp")
        } | {kind for kind, where in kinds.items() if where == module.name}
        checks += sum(_asks(node, here) for node in ast.walk(module.tree))
        ladders += [
            f"{module.name}.{node.name}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef) and sum(_asks(part, here) for part in ast.walk(node)) > 1
        ]
    return checks, ladders


def _asks(node: ast.AST, kinds: set[str]) -> bool:
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2):
        return False
    return any(isinstance(part, ast.Name) and part.id in kinds for part in ast.walk(node.args[1]))


PRIVATE = re.compile(r"_(?!_)\w+")


def private_torch(package: Package) -> dict[str, list[str]]:
    """Private names of torch, each with the modules that use it: ``torch._x``, ``from torch._x import
    y``, and private attributes that nothing in the package defines (hooks of a module, say)."""
    own = {name for module in package.modules for name in _defined(module)}
    own |= {path.stem for path in package.native}
    found: dict[str, set[str]] = {}
    for module in package.modules:
        knows_torch = any(name.split(".")[0] == "torch" for name in _imports(module))
        for name in _imports(module):
            if name.split(".")[0] == "torch" and any(PRIVATE.fullmatch(part) for part in name.split(".")):
                found.setdefault(name, set()).add(module.name)
        for node in ast.walk(module.tree):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if knows_torch and PRIVATE.fullmatch(name) and name not in own:
                found.setdefault(name, set()).add(module.name)
    return {name: sorted(modules) for name, modules in sorted(found.items())}


def _imports(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _defined(module: Module) -> Iterator[str]:
    """Names that a module defines or assigns."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


# --- All of it ---


def public_names(package: Package) -> list[str]:
    """``distcomp.__all__`` of the checkout, in a process of its own."""
    code = "import json, distcomp; print(json.dumps(sorted(distcomp.__all__)))"
    environ = {**os.environ, "PYTHONPATH": str(package.above)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.above,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"distcomp of {package.checkout} cannot be imported: {done.stderr[-1000:]}")
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def figures(checkout: Path) -> dict[str, Any]:
    """All figures of a checkout."""
    package = Package(checkout)
    lines = sum(module.lines for module in package.modules)
    names = public_names(package)
    cased: dict[str, list[str]] = {}
    for name in names:
        cased.setdefault(name.lower().replace("_", ""), []).append(name)
    used = Counter(name for module in package.modules for name in identifiers(module))
    checks, ladders = request_checks(package)
    graph = edges(package)
    return {
        "files": len(package.modules),
        "lines": lines,
        "native_files": len(package.native),
        "native_lines": sum(path.read_text().count("\n") for path in package.native),
        "longest_file_lines": max(module.lines for module in package.modules),
        "comment_share": round(sum(map(comment_lines, package.modules)) / lines, 4),
        "docstring_share": round(sum(map(docstring_lines, package.modules)) / lines, 4),
        "functions_above_60_lines": long_functions(package),
        "public_names": len(names),
        "public_names_that_differ_in_case_alone": [pair for pair in cased.values() if len(pair) > 1],
        "import_edges": sum(map(len, graph.values())),
        "import_circles": circles(graph),
        "import_circles_without_strings": circles(edges(package, strings=False)),
        "dynamic_imports": [
            f"{module.name}: {ast.unparse(node)}"
            for module in package.modules
            for node in ast.walk(module.tree)
            if dynamic(node) and "import" in ast.unparse(node.func)  # type: ignore[attr-defined]
        ],
        "request_isinstance_checks": checks,
        "request_isinstance_ladders": ladders,
        "private_torch_names": private_torch(package),
        "old_words": {word: used[word] for word in OLD_WORDS if used[word]},
        "names_defined_in_two_modules": twice_defined(package),
        "names_with_two_meanings": two_meanings(package),
    }


def table(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Before and after, in Markdown; lists by their length, shares in percent."""
    lines = ["| | before | after |", "|---|---|---|"]
    for key, value in new.items():
        cells = [_cell(key, found.get(key)) for found in (old, {key: value})]
        lines.append(f"| {key.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if key.startswith("import_circles"):
        return ", ".join(f"{len(circle)} files" for circle in value) or "none"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{len(value) if isinstance(value, list | dict) else value:,}"


def page_table() -> str:
    """The table of docs/decisions/rebuild.md: of the two committed results."""
    return table(result("code_figures_before"), result("code_figures"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--table", type=Path, metavar="OLD", help="print a table beside these older figures")
    parser.add_argument("--page", action="store_true", help=f"write the committed results into {PAGE.name}")
    options = parser.parse_args()
    if options.page:
        fill(PAGE, "code figures", page_table())
        return
    made = figures(options.checkout.resolve())
    if options.table:
        print(table(json.loads(options.table.read_text()), made))
        return
    text = json.dumps(made, indent=1) + "\n"
    if options.write:
        options.write.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
