"""A link that is only pretended keeps the laws of a real one."""

from types import SimpleNamespace

import pytest
import torch

from distcomp.collectives import AllGather, AllReduce
from distcomp.payload import Part, Payload
from distcomp.transports import throttle
from distcomp.transports.throttle import SlowLink, throttled


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what sleeps."""
    now = SimpleNamespace(s=100.0)

    def sleep(seconds):
        now.s += seconds

    monkeypatch.setattr(throttle.time, "perf_counter", lambda: now.s)
    monkeypatch.setattr(throttle.time, "sleep", sleep)
    return now


class Instant:
    """A transport that answers at once."""

    rank, size = 0, 4

    def __init__(self, clock):
        self._clock = clock

    def start(self, request):
        return SimpleNamespace(started_s=self._clock.s, finished_s=self._clock.s, wait=lambda: "answer")


def test_what_is_sent_waits_for_what_was_sent_before(clock):
    link = SlowLink(rate_bps=8000, delay_s=0.5)
    assert link.arrival_s(1000, hops=1) == 101.5
    assert link.arrival_s(1000, hops=2) == 103.0  # one second behind the first, and a hop more
    clock.s = 200.0
    assert link.arrival_s(1000, hops=0) == 201.0  # the link had been idle


def test_two_requests_under_way_take_as_long_as_their_bytes_together(clock, monkeypatch):
    monkeypatch.setenv("DISTCOMP_THROTTLE_BPS", "8000")
    transport = throttled(Instant(clock), SlowLink.from_env())
    payload = Payload.empty((Part("codes", torch.uint8, 1000),), torch.device("cpu"))
    sent_bytes = 3 * payload.wire.numel()
    first, second = (transport.start(AllGather(payload)) for _ in range(2))
    assert (first.wait(), clock.s) == ("answer", pytest.approx(100 + sent_bytes / 1000))
    assert (second.wait(), clock.s) == ("answer", pytest.approx(100 + 2 * sent_bytes / 1000))
    assert second.finished_s == clock.s
    assert second.started_s == 100.0


def test_a_ring_pays_the_delay_of_each_of_its_steps_a_sum_in_pieces_two_and_a_small_one_one(
    clock, monkeypatch
):
    monkeypatch.setenv("DISTCOMP_DELAY_S", "1")
    transport = throttled(Instant(clock), SlowLink.from_env())
    transport.start(AllReduce(torch.zeros(20_000_000))).wait()
    assert clock.s == 106.0
    transport.start(AllReduce(torch.zeros(100_000))).wait()
    assert clock.s == 108.0
    transport.start(AllReduce(torch.zeros(4))).wait()
    assert clock.s == 109.0


def test_without_a_word_in_the_environment_nothing_is_held_back(clock):
    transport = Instant(clock)
    assert throttled(transport, SlowLink.from_env()) is transport
