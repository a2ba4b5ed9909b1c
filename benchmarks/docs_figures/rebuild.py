"""docs/decisions/corrected-numbers.md: what is computed differently since the rebuild, and why."""

from __future__ import annotations

import re
from typing import Any

from benchmarks._tables import Block, markdown, result, source
from benchmarks.method_digests import COMPARED

OWNER = "what a part's owner owes is added just before the second encoding, no longer before the first"
FINER = "the second of two stages, which every rank shares, has a bit more than the first"
OMEGA = "damped by the omega of a quantizer by the largest value, which was bounded twelve times too high"
EXACT = "the extrapolation is computed as the model plus its change: what stands still is exact"

ROTATIONS = "the cosine transform is one of rotations, and its coefficients lie column by column"
SLICES = "slices are a convolution's filters, and bases are bfloat16, found from inner products"
SQUARES = "squares are added up in the order of the kernel in C"
FADING = "a residual that fades is faded and added with one rounding in the place of two"
MEANS = "the values of a mean are added up in the order of the kernel in C"

REASONS = {
    r"demo": ROTATIONS,
    r"sparse_loco": FADING,
    r"gradiveq.* 2 ranks": SLICES,
    r"gradiveq": f"{FINER}; {SLICES}",
    r"qsgd:bits=4,norm=l2 . 2 ranks": SQUARES,
    r"qsgd:bits=4,norm=l2": f"{FINER}; {SQUARES}",
    r"onebit . 2 ranks|onebit:error_feedback=false": MEANS,
    r"onebit . ": f"{OWNER}; {MEANS}",
    r"ecd.*allow_relative": EXACT,
    r"ecd": "the grid lies around the model that all began with, and widens: it clamped weights above 1",
    r"deepsqueeze": "damped by 1/(1 + omega) of its compressor, as choco and dcd are",
    r"post_local_sgd": "its first phase averages gradients, as the paper's; models are averaged after it",
    r"ef21:compressor=.Quantize:bits=4. . 2 ranks": OMEGA,
    r"ef21": f"{OWNER}; {OMEGA}",
    r"qsgd:bits=[24],error_feedback|pqasgd.*error_feedback|onebit_adam.*bits=4": f"{OWNER}; {FINER}",
    r"qsgd:bits=1|.*.qsgd:bits=1|qsgd:bits=4,rounding=nearest|topk|onebit|ef_signsgd": OWNER,
    r".*(3|4) ranks": FINER,
}
"""The first pattern that a differing row begins with says why."""

Rows = dict[str, dict[str, Any]]


def differing() -> list[str]:
    """The rows whose numbers are not those of before, in their order."""
    before: Rows = result("method_digests_before")["rows"]
    now: Rows = result("method_digests")["rows"]
    gone = [name for name in before if name not in now]
    if gone:
        raise SystemExit(f"rows are missing: {', '.join(gone)}")
    return [name for name in before if any(before[name].get(key) != now[name].get(key) for key in COMPARED)]


def reason_of(row: str) -> str:
    """Raises SystemExit for a difference that nobody meant."""
    for pattern, reason in REASONS.items():
        if re.match(pattern, row):
            return reason
    raise SystemExit(f"{row} differs, and no reason is known")


def digests() -> str:
    """Every differing row once, under its reason."""
    names, row_count = differing(), len(result("method_digests_before")["rows"])
    by_reason: dict[str, dict[str, list[str]]] = {}
    for name in names:
        method, ranks = name.split(" | ")
        by_reason.setdefault(reason_of(name), {}).setdefault(method, []).append(ranks.split()[0])
    table = markdown(
        ["why", "method (ranks)"],
        [
            [reason, ", ".join(f"`{method}` ({', '.join(ranks)})" for method, ranks in methods.items())]
            for reason, methods in by_reason.items()
        ],
    )
    equal = f"{row_count - len(names)} of {row_count} rows are equal bit for bit; {len(names)} differ:"
    return f"{equal}\n\n{table}\n\n{source(result('method_digests'), 'method_digests.py')}"


BLOCKS = {"digests": Block(digests, "method_digests", "method_digests_before")}
