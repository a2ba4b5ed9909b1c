"""What a method asks for, a step on the clock, and whether to compress."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import distcomp
from distcomp import cli
from distcomp.advice import TrainingTask
from distcomp.advice.advise import Advice, AdviceRow, advise, at_rate, break_even_bps
from distcomp.advice.calibrate import late_per_hop_s
from distcomp.advice.overlap import Timing, averaging_step, gradient_step
from distcomp.advice.predict import Machine, Prediction, predict, profile_method
from distcomp.advice.profile import ProfiledExchange, ProfiledRound, clock
from distcomp.advice.scale import Rehearsals
from distcomp.attaching import handle
from distcomp.attaching.observe import ObservedSteps
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import METHODS, parse
from distcomp.methods.base import Method
from distcomp.network import Fabric, Rack
from distcomp.network.model import Host, Overhead
from distcomp.network.request_sizes import RequestSizes

LAYOUT = Layout.of([("a", (96, 64)), ("bias", (96,)), ("b", (40, 33))])
GRADIENT = sorted(name for name, entry in METHODS.items() if entry.kind == "gradient")


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", GRADIENT)
def test_what_is_asked_for_weighs_what_the_method_declares(name: str, ranks: int) -> None:
    """Two accounts of the same bytes: the requests of a profile, and the formula, in the seventh step."""
    method = parse(name)
    assert isinstance(method, Method)
    found = predict(profile_method(name, [LAYOUT], ranks), machine(), Fabric.uniform(ranks, "1gbit"))
    declared = method.payload_bytes(LAYOUT, ranks, 6)
    if method.bytes_are_bound:
        assert 0.5 * declared < found.sent_bytes <= declared
        return
    assert found.sent_bytes == pytest.approx(declared, rel=0.02, abs=16)


@pytest.mark.parametrize("name", ["dcd", "choco", "dpsgd", "local_sgd:period=1", "pqasgd:period=4"])
def test_averagings_are_rehearsed_too(name: str) -> None:
    found = predict(profile_method(name, [LAYOUT], 6), machine(), Fabric.uniform(6, "1gbit"))
    exact = 2 * 4 * LAYOUT.numel
    if name in ("dpsgd",):
        assert found.sent_bytes == pytest.approx(exact, rel=0.01)
    elif name == "local_sgd:period=1":
        assert found.sent_bytes == pytest.approx(exact * 5 / 6, rel=0.01)
    else:
        assert 0 < found.sent_bytes < exact / 2


def machine() -> Machine:
    return Machine(ObservedSteps((LAYOUT,), (0.1,), 0.15))


def sums(*sizes: float) -> tuple[ProfiledRound, ...]:
    return tuple(ProfiledRound(0.01, RequestSizes("ring_all_reduce", (size,))) for size in sizes)


def test_a_step_by_hand() -> None:
    """Two buckets over 2 ranks at 8 Mbit/s: a sum of 1448 kB is 1547 kB of frames, 1.547 s."""
    fabric = Fabric.uniform(2, 8e6)
    timing = Timing((1.0, 2.0), 2.5)
    wire_s = 1.547
    profiles = [ProfiledExchange(sums(1_448_000), 0.05), ProfiledExchange(sums(1_448_000), 0.05)]
    step = gradient_step(timing, profiles, fabric)
    first_sent = 1.0 + 0.01
    second_sent = max(first_sent + wire_s, 2.0 + 0.01)  # the wire is busy
    over = second_sent + wire_s + 0.05
    assert step.step_s == pytest.approx(over + 0.5)
    assert step.exposed_s == pytest.approx(over - 2.0)
    assert step.wire_s == pytest.approx(2 * wire_s)
    assert step.work_s == pytest.approx(0.12)


def test_what_is_small_hides_behind_backward() -> None:
    timing = Timing((0.1, 2.0), 2.5)
    quick = gradient_step(
        timing, [ProfiledExchange(sums(100), 0.0), ProfiledExchange((), 0.0)], Fabric.uniform(2, 8e6)
    )
    assert quick.step_s == pytest.approx(2.5, abs=1e-3)


def test_while_one_bucket_is_on_the_wire_the_next_is_encoded() -> None:
    fabric, timing = Fabric.uniform(2, 8e6), Timing((0.0, 0.0), 0.0)
    heavy = ProfiledExchange((ProfiledRound(0.5, RequestSizes("ring_all_reduce", (1_448_000,))),), 0.0)
    assert gradient_step(timing, [heavy, heavy], fabric).step_s == pytest.approx(0.5 + 2 * 1.547)


def test_models_are_averaged_after_the_step_and_in_their_share_of_steps() -> None:
    profile = ProfiledExchange(sums(1_448_000), 0.03, share=0.25)
    step = averaging_step(Timing((1.0,), 1.2), [profile], Fabric.uniform(2, 8e6), slowness=2.0)
    assert step.step_s == pytest.approx(1.2 + 0.25 * (1.547 + 2 * 0.04))


def test_averaging_waits_for_the_cores_where_they_take_longer_than_the_wire() -> None:
    profile = ProfiledExchange(sums(1_448_000), 0.03)
    slow = Host(2, 1, around=Overhead((1.0,), (0.0,), (1.0 / 1_448_000,)))
    step = averaging_step(Timing((1.0,), 1.2), [profile], Fabric.uniform(2, 8e6), slow)
    assert step.step_s == pytest.approx(1.2 + 2 * 1.0 + 0.04)  # one second of a core that two share


def test_what_was_measured_beyond_the_model_is_added_per_hop() -> None:
    fabric = Fabric.uniform(4, "100mbit")
    late = Host(
        direct=Overhead((1e3, 1e6), (1e-3, 1e-3), (0.0, 0.0)), around=Overhead((1.0,), (2e-3,), (0.0,))
    )
    payload = RequestSizes("all_gather", (1e5,) * 4).exchange(fabric)
    assert payload.cost(fabric, late).seconds == pytest.approx(payload.cost(fabric).seconds + 1e-3)
    ring = RequestSizes("ring_all_reduce", (1e5,)).exchange(fabric)
    assert ring.cost(fabric, late).seconds == pytest.approx(ring.cost(fabric).seconds + 6 * 2e-3)


def test_traffic_of_a_kind_without_a_price_is_refused() -> None:
    with pytest.raises(
        DistcompError, match=r"no price for 'gather'; a request's traffic is one of all_reduce"
    ):
        RequestSizes("gather", (1e5,) * 4)


def test_what_was_measured_lies_on_lines_between_sizes() -> None:
    overhead = Overhead((100.0, 200.0, 400.0), (3.0, 1.0, 2.0), (1.0, 2.0, 10.0))
    assert [overhead.hop_s(nbytes) for nbytes in (1, 150, 300, 9000)] == [3.0, 2.0, 1.5, 2.0]
    assert [overhead.carried_s(nbytes) for nbytes in (1, 150, 300, 800)] == [1.0, 1.5, 6.0, 20.0]


def shared(ranks: int, cores: int, core_s: float) -> Host:
    """To which every exchange is so much of a core."""
    alike = Overhead((1e12,), (0.0,), (core_s,))
    return Host(ranks, cores, direct=alike, around=alike)


def test_backward_arithmetic_and_carrying_share_a_core_by_hand() -> None:
    """Two ranks on one core; a sum of 1,448,000 bytes is 1.547 s on the wire and 0.5 s of the core's, so 1 s
    of a rank's turn."""
    fabric, timing = Fabric.uniform(2, 8e6), Timing((1.0, 2.0), 2.5)
    profiles = [
        ProfiledExchange((ProfiledRound(0.1, RequestSizes("ring_all_reduce", (1_448_000,))),), 0.2),
        ProfiledExchange((), 0.0),
    ]
    step = gradient_step(timing, profiles, fabric, shared(2, 1, 0.5))
    sent = 1.0 + 0.2  # backward, 1.1 s done, goes on beside the arithmetic
    second = sent + 2 * (2.0 - 1.1)  # which is ready late, for it takes turns with carrying
    arrived = sent + 1.547
    assert arrived < second
    left = 1.0 - (2.0 - 1.1)
    over = second + 2 * left + (0.2 - left)
    assert step.step_s == pytest.approx(over + 0.5)
    assert step.exposed_s == pytest.approx(over - second)


def test_what_crosses_different_links_is_under_way_together() -> None:
    """One bucket is sent from rank 1 to rank 0 and the other back, or both the same way."""
    fabric, timing = Fabric.uniform(2, 8e6), Timing((0.0, 0.0), 0.0)
    there, back = (
        RequestSizes("all_to_all", (1_448_000.0, 0.0)),
        RequestSizes("all_gather", (1_448_000.0, 0.0)),
    )
    one, other = (ProfiledExchange((ProfiledRound(0.0, ask),), 0.0) for ask in (there, back))
    both = gradient_step(timing, [one, other], fabric)
    assert both.step_s == both.wire_s == pytest.approx(1.514 + 0.033)  # acknowledgements of the other
    again = gradient_step(timing, [one, one], fabric)
    assert again.step_s == again.wire_s == pytest.approx(2 * 1.514)


def test_an_answer_waits_for_the_core_that_carries_it() -> None:
    fabric, timing = Fabric.uniform(2, 8e6), Timing((0.0,), 0.0)
    profile = ProfiledExchange(sums(1_448_000), 0.05)
    assert gradient_step(timing, [profile], fabric, shared(2, 4, 0.9)).step_s == pytest.approx(0.06 + 1.547)
    assert gradient_step(timing, [profile], fabric, shared(2, 4, 4.0)).step_s == pytest.approx(0.06 + 4.0)


@given(
    ready=st.lists(st.floats(0, 2), min_size=1, max_size=4),
    works=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    core_s=st.floats(0, 2),
    cores=st.integers(1, 8),
)
def test_no_step_is_shorter_than_its_cores_are_busy(
    ready: list[float], works: list[float], core_s: float, cores: int
) -> None:
    """Four ranks. Whoever shares cores takes at least what all of it takes on them, and at most everything
    one after the other; nothing that is taken away makes a step longer."""
    ready = sorted(ready)
    timing, fabric = Timing(tuple(ready), ready[-1] + 0.1), Fabric.uniform(4, 8e6)
    profiles = [
        ProfiledExchange(
            tuple(ProfiledRound(w, RequestSizes("all_gather", (1e5,) * 4)) for w in works[:2]), works[2]
        )
        for _ in ready
    ]
    host = shared(4, cores, core_s)
    step = gradient_step(timing, profiles, fabric, host)
    carried_s = host.oversubscription * core_s * 2 * len(ready)
    assert step.work_s == pytest.approx(sum(works[:3]) * len(ready))
    everything_s = timing.step_s + step.work_s + carried_s
    if cores < 2 * 4:
        assert step.step_s >= everything_s - 1e-6
    assert max(timing.step_s, carried_s) - 1e-6 <= step.step_s <= everything_s + step.wire_s + 1e-6
    assert gradient_step(timing, profiles, fabric, shared(4, cores, 0.0)).step_s <= step.step_s + 1e-6


@given(late_s=st.floats(0, 0.5), core_s=st.floats(0, 0.1), around=st.booleans())
def test_what_a_hop_takes_is_found_from_what_the_step_took(
    late_s: float, core_s: float, around: bool
) -> None:
    fabric = Fabric.uniform(4, 8e6)
    kind = RequestSizes("ring_all_reduce", (1e4,)) if around else RequestSizes("all_gather", (1e4,) * 4)
    profiles = [ProfiledExchange((ProfiledRound(0.01, kind),) * 2, 0.01)] * 3
    measured = Machine(ObservedSteps((LAYOUT,) * 3, (0.1, 0.2, 0.3), 0.35), Host(4, 2), slowness=2.0)
    carried = Overhead((kind.sent_bytes(4),), (late_s,), (core_s,))
    host = replace(measured.host, direct=carried, around=carried)
    step_s = gradient_step(measured.timing, profiles, fabric, host, 2.0).step_s
    found = late_per_hop_s(step_s, core_s, profiles, measured, fabric)
    overhead = Overhead((kind.sent_bytes(4),), (found,), (core_s,))
    again = gradient_step(
        measured.timing, profiles, fabric, replace(measured.host, direct=overhead, around=overhead), 2.0
    )
    assert again.step_s == pytest.approx(step_s, rel=1e-6)
    if step_s > gradient_step(measured.timing, profiles, fabric, shared(4, 2, core_s), 2.0).step_s + 1e-3:
        assert found == pytest.approx(late_s, rel=1e-3)


def test_arithmetic_on_one_thread_is_timed_on_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 7.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 8.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock() == 7.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert clock() == 8.0


@pytest.mark.parametrize(
    "name", ["ddp", "qsgd:bits=4", "qsgd:bits=4,pattern=all_gather", "topk:ratio=0.05", "dcd"]
)
def test_beyond_eight_ranks_requests_are_extended_as_if_rehearsed(name: str) -> None:
    layout = Layout.of([("a", (512, 2400))])
    extended = Rehearsals(name, [layout]).among(24)
    profiled = profile_method(name, [layout], 24)
    fabric = Fabric.uniform(24, "100mbit", "1ms")
    for one, other in zip(extended.profiles, profiled.profiles, strict=True):
        assert [r.ask.kind for r in one.rounds] == [r.ask.kind for r in other.rounds]
        for mine, its in zip(one.rounds, other.rounds, strict=True):
            assert mine.ask.sent_bytes(24) == pytest.approx(its.ask.sent_bytes(24), rel=0.05)
            seconds = [ask.exchange(fabric).cost(fabric).seconds for ask in (mine.ask, its.ask)]
            assert seconds[0] == pytest.approx(seconds[1], rel=0.05)


def test_break_even_is_where_both_take_as_long() -> None:
    fabric = Fabric.uniform(8, "1gbit", "50us")
    one, plain = Rehearsals("qsgd:bits=4", [LAYOUT]), Rehearsals("ddp", [LAYOUT])
    slow = Machine(ObservedSteps((LAYOUT,), (1e-5,), 2e-5), slowness=1.0)
    even = break_even_bps(one, plain, slow, fabric)
    assert 1e6 < even < 1e12
    below, above = (
        [predict(each.among(8), slow, at_rate(fabric, rate)).step_s for each in (one, plain)]
        for rate in (even * 0.9, even * 1.1)
    )
    assert below[0] < below[1]
    assert above[0] > above[1]


def test_a_rate_scales_uplinks_in_proportion() -> None:
    fabric = Fabric((1e8, 5e7), 1e-3, (Rack((0,), 2e7), Rack((1,), math.inf)))
    faster = at_rate(fabric, 1e9)
    assert faster.rates_bps == (1e9, 5e8)
    assert [rack.uplink_bps for rack in faster.racks] == [2e8, math.inf]


def test_on_a_shared_core_arithmetic_and_backward_hold_each_other_up() -> None:
    """0.3 s of arithmetic while backward has 1 s to go take 0.6 s; backward then ends at 2.3 s."""
    timing, profile = (
        Timing((1.0, 2.0), 2.5),
        ProfiledExchange((ProfiledRound(0.3, RequestSizes("all_gather", (0.0, 0.0))),), 0.0),
    )
    alone = gradient_step(timing, [profile, ProfiledExchange((), 0.0)], Fabric.uniform(2))
    assert alone.step_s == pytest.approx(2.5)
    oversubscribed = gradient_step(
        timing, [profile, ProfiledExchange((), 0.0)], Fabric.uniform(2), Host(2, 2)
    )
    assert oversubscribed.step_s == pytest.approx(2.3 + 0.5)


def training_task() -> TrainingTask:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def batch(worker: int, workers: int, step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(worker))
        return x, x.roll(1, 1)

    return TrainingTask(model, batch, nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1))


def test_on_a_network_that_costs_nothing_the_advice_is_not_to_compress() -> None:
    advice = advise(training_task(), Fabric.uniform(4))
    assert advice.best.method == "ddp"
    assert advice.sentence.startswith(("Do not compress", "Nothing is recommended"))


def _row(method: str, step_s: float, speed_up: float) -> AdviceRow:
    return AdviceRow(method, Prediction(step_s, 0.0, 0.0, 0.0, sent_bytes=1.0), speed_up, math.inf, {})


@pytest.mark.parametrize(
    ("noise", "begins"),
    [
        (0.05, "Use bf16: 2,000 ms a step, 1.5 times"),
        (0.7, "Nothing is recommended: bf16 is predicted 1.50 t"),
    ],
)
def test_nothing_is_recommended_inside_the_noise(noise: float, begins: str) -> None:
    rows = (_row("bf16", 2.0, 1.5), _row("ddp", 3.0, 1.0))
    advice = Advice(rows, Fabric.uniform(2), 1.0, 10, {}, noise)
    assert advice.sentence.startswith(begins)
    assert advice.best.method == ("bf16" if noise < 0.5 else "ddp")
    assert f"{noise:.0%}" in advice.sentence


def test_what_two_measurements_differ_by_is_the_noise() -> None:
    layout = Layout.of([("weight", (64, 64))])
    quiet, busy = ObservedSteps((layout,), (0.01,), 0.02), ObservedSteps((layout,), (0.05,), 0.1)
    fabric = Fabric.uniform(2, "1mbit")
    told: list[str] = []
    advice = advise((busy, quiet), fabric, ("ddp", "bf16"), tell=told.append)
    assert advice.compute_s == 0.02  # of the faster time
    assert advice.noise > 0.1
    assert "[2/2] timing bf16" in told


LOOP = """\
import sys
import torch, torch.distributed as dist, distcomp
from torch.nn.parallel import DistributedDataParallel

assert sys.argv[1:] == ["--width", "48"] and __name__ == "__main__"
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(48, 48))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
ATTACH
for step in range(STEPS):
    optimizer.zero_grad()
    model(torch.ones(4, 48)).square().mean().backward()
    optimizer.step()
    print("step", step)
"""


@pytest.mark.parametrize("attach", ["", "handle = distcomp.attach(model, optimizer, 'qsgd:bits=4')"])
def test_advise_reads_a_training_loop_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attach: str
) -> None:
    vars(distcomp).pop("attach", None)  # as in a process that has not asked for it yet
    script = tmp_path / "train.py"
    script.write_text(LOOP.replace("ATTACH", attach).replace("STEPS", "10**9"))
    asked = [
        "advise",
        "--ranks",
        "4",
        "--rate",
        "1mbit",
        "--methods",
        "bf16",
        "--json",
        "--model",
        str(script),
    ]
    assert cli.main([*asked, "--", "--width", "48"]) == 0
    told = capsys.readouterr()
    everything = json.loads(told.out)
    assert everything["parameters"] == 48 * 48 + 48
    assert "step 3" in told.err
    assert not torch.distributed.is_initialized()
    script.write_text(LOOP.replace("ATTACH", attach).replace("STEPS", "3"))
    assert cli.main([*asked, "--", "--width", "48"]) == 2
    assert "took 3 steps with a DistributedDataParallel or FSDP2 model" in capsys.readouterr().err
    script.write_text("raise RuntimeError('boom')")
    assert cli.main(asked) == 2
    assert "failed after 0 steps" in capsys.readouterr().err
    assert distcomp.attach is handle.attach


def test_on_a_slow_one_it_names_what_is_fastest() -> None:
    advice = advise(
        training_task(), Fabric.uniform(4, "2mbit", "1ms"), ("bf16", "qsgd:bits=4", "qsgd:bits=1")
    )
    assert [row.method for row in advice.rows] == ["qsgd:bits=1", "qsgd:bits=4", "bf16", "ddp"]
    assert advice.best.method == "qsgd:bits=1"
    assert advice.rows[2].speed_up == pytest.approx(2.0, rel=0.1)
    assert advice.rows[0].efficiency[2] > advice.rows[0].efficiency[4096]


SCRIPT = """\
import torch
from distcomp.advice import TrainingTask

def training_task(arguments):
    model = torch.nn.Linear(256, 256)
    def batch(worker, workers, step):
        return torch.ones(4, 256), torch.ones(4, 256)
    return TrainingTask(model, batch, torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1))
"""


def test_the_command_tells_plots_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    common = ["advise", "--ranks", "8", "--rate", "1mbit", "--methods", "bf16;qsgd:bits=8"]
    plot = tmp_path / "plot.svg"
    assert cli.main([*common, "--plot", str(plot), "--model", str(script)]) == 0
    told = capsys.readouterr().out
    assert "65,792 parameters" in told
    assert "Use qsgd:bits=8" in told
    assert plot.read_text().startswith("<?xml")
    assert cli.main([*common, "--json", "--model", str(script)]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert everything["recommended"] == "qsgd:bits=8"
    assert {row["method"] for row in everything["methods"]} == {"ddp", "bf16", "qsgd:bits=8"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--ranks", "4", "--methods", "torch:powersgd"], "not predicted"),
        (["--ranks", "4", "--methods", "nothing"], "no method 'nothing'"),
        ([], "say how many"),
        (["--ranks", "4", "--ranks-here", "0"], "1 or more"),
    ],
)
def test_mistakes_are_told_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], words: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert cli.main(["advise", *given, "--model", str(script)]) == 2
    assert words in capsys.readouterr().err


def test_more_of_the_same_fabric() -> None:
    racks = (Rack((0, 1), 1e8, 1e-3), Rack((2, 3), 1e8, 1e-3))
    six = Fabric((1e9,) * 4, 1e-4, racks).of(6)
    assert [rack.ranks for rack in six.racks] == [(0, 1), (2, 3), (4, 5)]
    assert six.rates_bps == (1e9,) * 6
