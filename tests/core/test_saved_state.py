"""What a checkpoint may hold: damaged ones are refused by one sentence, or come back right."""

from __future__ import annotations

import copy

import pytest
import torch

from distcomp import DistcompError
from distcomp.methods import parse
from distcomp.methods.base import join_state
from distcomp.runtime.saved_state import Fingerprint, Place, unpack_state
from distcomp.runtime.states import States

from . import state_fuzz as fuzz


def test_damaged_checkpoints_are_refused_or_right() -> None:
    became = [fuzz.try_to_load(*case) for case in fuzz.cases(1500, seed=0)]
    assert set(became) == {"refused", "loaded"}
    assert became.count("refused") > len(became) / 2


@pytest.mark.parametrize("text", fuzz.TEXTS)
def test_what_was_saved_is_loaded(text: str) -> None:
    assert fuzz.try_to_load(text, fuzz.part_of(text), strict=True) == "loaded"


def test_parts_of_different_steps_are_refused() -> None:
    parts = [fuzz.part_of("qsgd:bits=1", iterations=3), {"rank1": fuzz.part_of("qsgd:bits=1", 4)["rank0"]}]
    states = States(parse("qsgd:bits=1"))
    with pytest.raises(DistcompError, match="iterations is 3 in rank0 and 4 in rank1"):
        unpack_state(
            parts,
            Place(0, (0,)),
            Fingerprint("qsgd:bits=1", "3 tensors"),
            lambda part: states.expected(fuzz.LAYOUT, part["state"]),
        )


def test_parts_of_two_groups_are_not_mixed() -> None:
    one, other = (copy.deepcopy(fuzz.part_of("qsgd:bits=1")["rank0"]) for _ in range(2))
    one["ranks"], other["ranks"] = "0,2", "1,3"
    with pytest.raises(DistcompError, match="several groups of ranks"):
        unpack_state({"rank0": one, "rank1": other}, Place(0, (0, 1)), Fingerprint("", ""), lambda _: {})


def test_a_state_of_another_width_never_reaches_a_kernel() -> None:
    method = parse("powersgd:rank=2")
    narrow = {"0.weight": {"inner/q": torch.ones(2, 3), "residual": torch.zeros(48)}}
    fresh = method.init(fuzz.LAYOUT)
    path = next(path for path in States(method).expected(fuzz.LAYOUT, {})["0.weight"] if path.endswith("q"))
    narrow["0.weight"] = {path: torch.ones(2, 3)}
    with pytest.raises(DistcompError, match="has the shape"):
        join_state(narrow, fresh)
