"""Damaged checkpoints: what somebody saved, with a few things in it replaced, cut, renamed or lost."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distcomp import DistcompError
from distcomp.layout import Layout
from distcomp.methods import parse
from distcomp.runtime.saved_state import Fingerprint, Place, pack_state, unpack_state
from distcomp.runtime.states import States

TEXTS = ("qsgd:bits=1", "powersgd:rank=2", "allocate", "onebit_adam:freeze_step=2", "gradiveq", "topk")
LAYOUT = Layout.of([("0.weight", (8, 6)), ("0.bias", (8,)), ("1.weight", (4, 8))])
PLACE = Place(0, (0, 1))
ODD = (
    None, "", "5", "inf", b"5", -1, 10**9, 10**40, 2.5, float("nan"), float("inf"), True, [], [1, 2], {},
    {"a": 1}, (), {1: 2}, object(), torch.zeros(()), torch.zeros(1), torch.zeros(48),
    torch.ones(3, dtype=torch.int64),
    torch.full((48,), float("nan")), torch.zeros(2, 2).to_sparse(), torch.zeros(48, device="meta"),
    torch.zeros(48, dtype=torch.complex64), torch.zeros(0), torch.zeros(8, 6), torch.zeros(48).double(),
)  # fmt: skip


def part_of(text: str, iterations: int = 3) -> dict[str, Any]:
    """What rank 0 of 2 would have saved of a model that is trained with ``text``."""
    states = States(parse(text))
    state = states.of(LAYOUT, torch.device("cpu"))
    states.commit(LAYOUT, state)
    saved = states.by_parameter()
    content = {"iterations": iterations, "seed": 0, "exchanges": {}, "state": saved}
    return pack_state(PLACE, Fingerprint(text, "3 tensors"), content)


def _places(node: Any, into: list[tuple[dict[Any, Any], Any]]) -> list[tuple[dict[Any, Any], Any]]:
    for key, value in node.items():
        into.append((node, key))
        if isinstance(value, dict):
            _places(value, into)
    return into


def damaged(saved: dict[str, Any], rng: random.Random) -> Any:
    """A copy with one to three damages."""
    bad: Any = copy.deepcopy(saved)
    for _ in range(rng.randint(1, 3)):
        places = _places(bad, [])
        if not places:
            return copy.deepcopy(rng.choice(ODD))
        node, key = rng.choice(places)
        value, kind = node.get(key), rng.randrange(6)
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[rng.choice(["other", 7, None, ("a",)])] = node.pop(key)
        elif kind == 2 and plain and value.numel():
            node[key] = value.reshape(-1)[: rng.randrange(value.numel())]
        elif kind == 3 and plain and value.is_floating_point() and value.numel():
            value.reshape(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), 2.0])
        elif kind == 4:
            other, another = rng.choice(places)
            node[key] = copy.deepcopy(other.get(another))
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    return bad


def try_to_load(text: str, saved: Any, strict: bool) -> str:
    """What became of it: loaded, or refused. What was loaded is of the right shape, finite, and joins."""
    states = States(parse(text))
    try:
        fields = unpack_state(
            saved,
            PLACE,
            Fingerprint(text, "3 tensors"),
            lambda part: states.expected(LAYOUT, part["state"]),
            strict,
        )
    except DistcompError:
        return "refused"
    expected = states.expected(LAYOUT, {})
    assert type(fields["iterations"]) is int
    assert type(fields["seed"]) is int
    for name, leaves in fields["state"].items():
        for path, value in leaves.items():
            wanted = expected[name][path]
            assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
            assert torch.isfinite(value).all()
    if strict and fields["iterations"]:
        assert {name: set(leaves) for name, leaves in fields["state"].items()} == {
            name: set(leaves) for name, leaves in expected.items()
        }
    states.load(fields["state"])
    states.of(LAYOUT, torch.device("cpu"))
    return "loaded"


def cases(count: int, seed: int) -> Iterator[tuple[str, Any, bool]]:
    """Damaged checkpoints of several methods, alone and in lists, read with and without ``strict``."""
    rng = random.Random(seed)
    good = {text: part_of(text) for text in TEXTS}
    for _ in range(count):
        text = rng.choice(TEXTS)
        bad = damaged(good[text], rng)
        if rng.random() < 0.2:
            bad = [bad, damaged({"rank1": copy.deepcopy(good[text]["rank0"])}, rng)]
        yield text, bad, rng.random() < 0.7
