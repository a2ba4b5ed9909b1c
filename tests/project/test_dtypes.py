"""No tensor of ours takes its type from ``torch.set_default_dtype``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distcomp"
FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "rand",
    "randn",
    "full",
    "tensor",
    "eye",
    "linspace",
    "logspace",
    "normal",
}


def is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant)


def takes_the_default(call: ast.Call) -> bool:
    """Whether a call of a function of torch makes a tensor whose type nobody names."""
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr == "where":  # of two numbers
        return len(call.args) == 3 and is_number(call.args[1]) and is_number(call.args[2])
    named = any(keyword.arg in ("dtype", None) for keyword in call.keywords)
    return call.func.attr in FACTORIES and not named


def without_dtype(source: str) -> list[str]:
    """The calls ``torch.zeros(...)`` and the like in ``source`` that name no dtype, as ``line: name``."""
    return [
        f"{call.lineno}: torch.{call.func.attr}"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and takes_the_default(call)
    ]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_new_tensor_names_its_type(path: Path) -> None:
    assert without_dtype(path.read_text()) == []


def test_the_rule_finds_one_without() -> None:
    source = (
        "import torch\ntorch.zeros(3)\ntorch.zeros(3, dtype=torch.int64)\nx.new_zeros(3)\ntorch.rand(())\n"
        "torch.where(x, 1.0, -1.0)\ntorch.where(x, y, -1.0)\n"
    )
    assert without_dtype(source) == ["2: torch.zeros", "5: torch.rand", "6: torch.where"]
