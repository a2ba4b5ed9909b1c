"""A few hundred hostile updates; benchmarks/fuzz_updates.py feeds a hundred thousand."""

from __future__ import annotations

from collections import Counter

from tests.updates import update_fuzz


def test_hostile_updates_are_applied_exactly_or_refused():
    became = Counter(update_fuzz.try_to_apply(*case) for case in update_fuzz.cases(600, seed=1))
    assert became["refused"] > 400
    assert update_fuzz.try_to_apply(update_fuzz.good()[0].to_bytes()) == "applied"
