"""Texts of methods that nobody meant: settings replaced, doubled, nested, misspelt, and characters scribbled
over."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from distcomp.averaging.workers import Workers
from distcomp.errors import DistcompError
from distcomp.grammar import write_call
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.registry import COMPRESSORS, METHODS, load_all
from tests.buffers import draw
from tests.lockstep import once

load_all()

LAYOUT = Layout.of([("matrix", (24, 20)), ("bias", (8,)), ("table", (4, 12))])
VALUES = (
    "0", "1", "2", "3", "-1", "4.0", "0.5", "1e-9", "1e308", "1e999", "nan", "inf", "-inf", "2147483647",
    "2147483648", "1" + "0" * 20, "1" * 5000, "true", "false", "none", "", "max", "'max'", "'", "much", "é",
    "(0.9,)", "(0.9,0.99)", "('a','b')", "[1]", "{}", "((0,1),(2,3))", "((0,0),)", "4 -> 2 @ 5",
    "1 ~> 0.01 @ 3", "2 -> 1 @ -1", "4 -> 2 @ 5 -> 8 @ 5", "0x1", "1_0", "__import__('os')", "qsgd",
    "(qsgd:bits=2)", "(topk:ratio=0.1,values=int4)", "(warmup:inner=(qsgd:bits=1))", "bf16", "Q4.12",
    "Q99.99",
)  # fmt: skip
PIECES = (*"(){}[]'\",:=@", "->", "~>", "none", "1e309", "-1", "qsgd", "values", "é", "\0", " ", "((((((((((")


def damaged(rng: random.Random) -> str:
    """A text of a method with one to three odd settings, and sometimes scribbled over."""
    name = rng.choice(sorted(METHODS))
    known = list(METHODS[name].parameters)
    pairs = [
        f"{rng.choice(known) if known and rng.random() < 0.9 else 'bits'}={_value(rng)}"
        for _ in range(rng.randint(0, 3))
    ]
    text = f"{name}:{','.join(pairs)}" if pairs else name
    for _ in range(rng.randrange(4) if rng.random() < 0.3 else 0):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(3) :]
    for _ in range(rng.randrange(30) if rng.random() < 0.05 else 0):
        text = f"warmup:inner=({text})"
    return text


def _value(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(VALUES)
    inner = rng.choice(sorted(METHODS) + sorted(COMPRESSORS))
    key = rng.choice(["bits", "ratio", "rank", "compressor", "block", "values"])
    return f"({write_call(inner, {})}:{key}={rng.choice(VALUES)})"


def try_to_use(text: str) -> str:
    """What became of it: used or refused. What is made is made again by its own text, and carries a gradient
    or a model of two workers: finite, and of the right form. Where it can't, a DistcompError says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = ""
        try:
            made = parse(text)
        except DistcompError as refusal:
            said = str(refusal)
        if said:
            assert "\n" not in said
            assert len(said) < 2000
            return "refused"
        assert parse(str(made)) == made
        try:
            _use(made)
        except DistcompError:
            return "refused when used"
    return "used"


def _use(made: Any) -> None:
    if isinstance(made, Method):
        round_ = once(made, draw(2, LAYOUT), LAYOUT)
        assert round_.estimate.shape == (LAYOUT.numel,)
        assert round_.estimate.dtype == torch.float32
        assert round_.estimate.isfinite().all()
        return
    workers = Workers(made, draw(1, LAYOUT)[0], 2, LAYOUT)
    for _ in range(3):
        for model in workers.models:
            model.add_(0.01 * torch.ones_like(model))
        workers.step()
    assert workers.stacked.isfinite().all()


def cases(count: int, seed: int) -> Iterator[tuple[str]]:
    """Damaged texts of all methods."""
    rng = random.Random(seed)
    for _ in range(count):
        yield (damaged(rng),)
