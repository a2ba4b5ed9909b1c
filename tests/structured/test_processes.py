"""On real processes: replicas stay identical under every method, bytes are those of the summary, runs
resume."""

from __future__ import annotations

import pytest

from tests.structured import jobs

HEADERS = 400
"""Payload headers of a step's buffers, at most."""


@pytest.mark.parametrize("method", ["identity", "qsgd:bits=4", "powersgd", "pqasgd:period=2"])
def test_replicas_of_every_structure_stay_identical(cluster, method) -> None:
    first, *others = cluster(2).run(jobs.replicas, method)
    start = {name: jobs.flat(change(jobs.network())) for name, change in jobs.STRUCTURES.items()}
    for name, (stored, computed, sent, gradient_bytes, declared) in first.items():
        for other in others:
            assert other[name][0] == stored
            assert other[name][1] == computed
        assert stored != start[name]
        assert gradient_bytes == 4 * len(stored)
        if method == "identity":  # at two ranks each sends as much as a gradient has
            assert gradient_bytes <= sent <= gradient_bytes + HEADERS
        elif method == "qsgd:bits=4":
            assert declared <= sent <= declared + HEADERS
            assert declared < gradient_bytes  # headers and scales weigh much in tensors as small as these


@pytest.mark.parametrize("method", ["qsgd:bits=4", "powersgd", "pqasgd:period=2"])
def test_four_ranks_agree_too(cluster, method) -> None:
    first, *others = cluster(4).run(jobs.replicas, method)
    for name, (stored, computed, *_) in first.items():
        assert all(other[name][0] == stored and other[name][1] == computed for other in others)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("circulant", "qsgd:bits=1"),
        ("low rank", "powersgd"),
        ("hashed", "pqasgd:period=2"),
        ("split", "qsgd:bits=4"),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(cluster, name, method) -> None:
    whole = cluster(2).run(jobs.resumed, name, method, 0)
    assert cluster(2).run(jobs.resumed, name, method, 2) == whole


def test_what_drivers_add_is_alike_on_all_ranks(cluster) -> None:
    first, second = cluster(2).run(jobs.driven)
    assert first == second


def test_a_model_is_converted_early_and_sends_less_from_then_on(cluster) -> None:
    (stored, before, after), (other, _, _) = cluster(2).run(jobs.converted_early)
    assert stored == other
    dense = 4 * len(jobs.flat(jobs.network()))
    assert dense <= before <= dense + HEADERS
    assert 4 * len(stored) <= after <= 4 * len(stored) + HEADERS
    assert after < 0.4 * before


def test_groups_of_a_cut_model_are_sent_in_turn(cluster) -> None:
    (stored, sent, whole), (other, _, _) = cluster(2).run(jobs.in_turn)
    assert stored == other
    group_bytes = 4 * 24 * 192 // 9  # of three groups, each 8 of 24 outputs by 64 of 192 inputs
    assert all(abs(one - (whole - 2 * group_bytes)) <= HEADERS for one in sent)


def test_reconstruction_rides_any_method(cluster) -> None:
    first, second = cluster(2).run(jobs.reconstructed)
    assert first == second
