"""Memory of an exchange is used again, and only where nobody holds it any more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distcomp.kernels import memory

NUMEL = memory.SMALLEST_BYTES // 4


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    memory.give_back()
    yield
    memory.give_back()


def test_what_nobody_holds_is_used_again() -> None:
    first = memory.empty(NUMEL)
    at = first.data_ptr()
    del first
    again = memory.empty(NUMEL)
    assert again.data_ptr() == at
    assert (again.shape, again.dtype, again.requires_grad) == ((NUMEL,), torch.float32, False)


@pytest.mark.parametrize(
    "hold",
    [lambda x: x, lambda x: x[3:5], lambda x: x.view(2, -1).T, lambda x: x.numpy(), lambda x: [x.detach()]],
    ids=["itself", "a slice", "a transposed view", "an array", "a detached one"],
)
def test_what_somebody_holds_is_left_alone(hold: object) -> None:
    first = memory.empty(NUMEL).fill_(7)
    at, held = first.data_ptr(), hold(first)  # type: ignore[operator]
    del first
    other = memory.empty(NUMEL)
    assert other.data_ptr() != at
    other.fill_(1)
    for one in held if isinstance(held, list) else [held]:
        assert (torch.as_tensor(one) == 7).all()


def test_what_a_future_holds_is_left_alone() -> None:
    """As DistributedDataParallel holds an estimate, which Python does not see."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(memory.empty(NUMEL).fill_(7))
    memory.empty(NUMEL).fill_(1)
    assert (future.value() == 7).all()


def test_many_at_once_are_all_different() -> None:
    many = [memory.empty(NUMEL).fill_(i) for i in range(2 * memory.MOST)]
    assert all((one == i).all() for i, one in enumerate(many))
    places = {one.data_ptr() for one in many[: memory.MOST]}
    del many
    assert {memory.empty(NUMEL).data_ptr() for _ in range(2)} <= places


def test_sizes_do_not_meet_and_small_ones_are_not_kept() -> None:
    first = memory.empty(NUMEL)
    at = first.data_ptr()
    del first
    assert memory.empty(NUMEL + 1).numel() == NUMEL + 1
    assert memory.empty(NUMEL).data_ptr() == at
    memory.give_back()
    memory.empty(NUMEL - 1)
    assert not memory._storages


def test_sizes_that_change_do_not_pile_up() -> None:
    """What is active is another number of elements in each step, of up to as many as there are subsets."""
    most_bytes = 0
    for numel in range(NUMEL, 2 * NUMEL, 997):
        assert memory.empty(numel).shape == (numel,)
        most_bytes = 4 * numel
    kept = [storage.nbytes() for storages in memory._storages.values() for storage in storages]
    assert len(kept) <= 9
    assert max(kept) <= most_bytes * 9 / 8
