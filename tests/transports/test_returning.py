"""A closed edge opens again with one exchange at both ends, or at none."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from distcomp.transports import returning
from distcomp.transports.returning import TRAINS, WAITS, Return

SIZE = 4
AHEAD = SIZE + 1


def both() -> tuple[Return, Return]:
    """The way of rank 2 back to rank 1, as either end sees it."""
    store = HashStore()
    return Return(store, "attach1", 2, 1), Return(store, "attach1", 2, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, SIZE), st.lists(st.booleans(), min_size=40, max_size=40))
def test_ranks_that_train_open_it_with_the_same_exchange(lead: int, turns: list[bool]) -> None:
    """Whoever is ahead, by no more exchanges than there are ranks, and in whatever order they come."""
    host, back = both()
    numbers = {"host": 10 + lead, "back": 10}
    opened: dict[str, int] = {}
    for host_next in turns:
        who = "host" if host_next else "back"
        other = "back" if host_next else "host"
        if numbers[who] - numbers[other] >= SIZE:  # in step: it waits for the other
            who, other = other, who
        number = numbers[who]
        if who not in opened:
            if who == "host" and host.propose(number, AHEAD):
                opened[who] = number
            if who == "back" and back.accept(number) == number:
                opened[who] = number
        if who in opened and other not in opened and number == opened[who]:
            # It waits there for the other end, which comes by itself.
            while numbers[other] <= opened[who]:
                at = numbers[other]
                agreed = host.propose(at, AHEAD) if other == "host" else back.accept(at) == at
                if agreed:
                    opened[other] = at
                numbers[other] += 1
        numbers[who] += 1
    assert len(opened) in (0, 2), opened
    assert len(set(opened.values())) <= 1, opened
    assert opened or turns.count(True) < 8 or turns.count(False) < 8


def test_one_that_waits_takes_the_exchange_that_comes_next() -> None:
    host, back = both()
    back.say(WAITS)
    found: list[bool] = []
    proposing = threading.Thread(target=lambda: found.append(host.propose(7, AHEAD)))
    proposing.start()
    while (proposal := back.proposed()) is None:
        pass
    assert back.agree(proposal) == 7
    proposing.join()
    assert found == [True]


def test_one_that_has_gone_elsewhere_holds_nobody_up() -> None:
    host, back = both()
    back.say(WAITS)
    found: list[bool] = []
    proposing = threading.Thread(target=lambda: found.append(host.propose(7, AHEAD)))
    proposing.start()
    while (proposal := back.proposed()) is None:
        pass
    back.say(TRAINS)  # another neighbour took it in
    proposing.join()
    assert found == [False]
    assert back.agree(proposal) is None


def test_nobody_comes_where_nobody_said_that_it_would() -> None:
    host, back = both()
    assert not host.propose(3, AHEAD)
    assert back.accept(3) is None  # says that it is there
    assert not host.propose(4, AHEAD)  # proposes 4 + AHEAD
    assert back.accept(4 + AHEAD + 1) is None  # too late, and says so
    assert not host.propose(4 + AHEAD, AHEAD)


def test_a_proposal_that_nobody_answers_is_taken_back_and_made_again() -> None:
    host, back = both()
    back.say(WAITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(returning, "HOLD_S", 0.0)
        assert not host.propose(7, AHEAD)
    assert back.proposed() is None
    found: list[bool] = []
    proposing = threading.Thread(target=lambda: found.append(host.propose(8, AHEAD)))
    proposing.start()
    while (proposal := back.proposed()) is None:
        pass
    assert back.agree(proposal) == 8
    proposing.join()
    assert found == [True]


def test_whoever_comes_after_the_host_has_passed_is_not_told_to_wait_there() -> None:
    host, back = both()
    back.say(TRAINS)
    assert not host.propose(3, AHEAD)  # proposes 3 + AHEAD
    assert not host.propose(3 + AHEAD, AHEAD)  # nobody said yes
    assert back.accept(3 + AHEAD) is None
    assert not host.propose(4 + AHEAD, AHEAD)
    assert back.accept(4 + AHEAD) == 4 + 2 * AHEAD


def test_what_was_agreed_on_and_did_not_happen_is_over() -> None:
    host, back = both()
    back.say(TRAINS)
    host.propose(3, AHEAD)
    assert back.accept(3 + AHEAD) == 3 + AHEAD
    assert back.accept(4 + AHEAD) is None  # the host never came
    assert not host.propose(4 + AHEAD, AHEAD)
    assert back.accept(5 + AHEAD) == 4 + 2 * AHEAD


def test_a_proposal_that_comes_while_another_is_answered_stays() -> None:
    class Overtaken(HashStore):
        """Between what the returning rank reads and what it writes, the host proposes something else."""

        def compare_set(self, key: str, expected: str, word: str) -> bytes:
            self.set(key, "at 14")
            return super().compare_set(key, expected, word)

    back = Return(Overtaken(), "attach1", 2, 1)
    back.say("at 9")
    assert back.accept(5) is None
    assert back.proposed() == "at 14"
