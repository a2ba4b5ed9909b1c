"""Sharded steps: what FSDP2 calls, what it costs by hand, what it sends, and workers that hold one model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distcomp import cli
from distcomp.advice import Scenario, Setting, Simulation, TrainingTask
from distcomp.advice.advise import advise
from distcomp.advice.overlap import EXCHANGE_CORE_S, HOOKED_CORE_S, sharded_step
from distcomp.advice.predict import Machine, predict
from distcomp.advice.profile import ProfiledExchange, ProfiledRound
from distcomp.advice.scale import ShardedRehearsals
from distcomp.advice.sharded import Placement, ShardedSetting, profile_sharded
from distcomp.attaching.observe_shards import ObservedShardedSteps, ShardedCall, observe_shards_alone
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import parse
from distcomp.methods.reduce_scatter import to_shards
from distcomp.methods.weight_gather import parse_weight_gather
from distcomp.network import Fabric
from distcomp.network.model import Host, Overhead
from distcomp.network.request_sizes import LATE_IN_A_RING, RequestSizes

LAYERS = [Layout.of([("a.weight", (960, 33)), ("a.bias", (960,))]), Layout.of([("b.weight", (480, 64))])]
KEPT, MOVED = "gather:compressor=(qsgd:bits=8),reuse=true", "difference:compressor=(qsgd:bits=4)"


def observed(device: str = "cpu", dtype: torch.dtype = torch.float32) -> ObservedShardedSteps:
    """Two modules, forward and backward; 0.1 s of computing before each call and after the last."""
    order = [("gather", 0, False), ("gather", 1, False), ("gather", 1, True), ("reduce", 1, True)]
    order += [("gather", 0, True), ("reduce", 0, True)]
    calls = tuple(ShardedCall(kind, LAYERS[at], dtype, back, device) for kind, at, back in order)
    return ObservedShardedSteps(calls, tuple(0.1 * (i + 1) for i in range(6)), 0.8, 0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3))


def batch(worker: int, workers: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(worker + workers * step))
    return x, x.argmax(1) % 3


def task(model: nn.Module | None = None) -> TrainingTask:
    return TrainingTask(
        model or network(), batch, cross_entropy, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )


def test_what_fsdp_calls_is_observed_on_one_rank() -> None:
    steps = observe_shards_alone(network(), batch(0, 1, 0), cross_entropy, lambda p: torch.optim.SGD(p, 0.1))
    told = [(call.kind, call.name, call.in_backward) for call in steps.calls]
    forward = [("gather", f"{at}.weight", False) for at in (0, 1, 2)]
    assert told[:3] == forward
    assert sorted(told[3:]) == sorted(
        [(kind, f"{at}.weight", True) for kind in ("gather", "reduce") for at in (0, 1, 2)]
    )
    assert [param.role for call in steps.calls[:3] for param in call.layout.slices] == [
        "matrix", "bias", "norm", "norm", "matrix", "bias",
    ]  # fmt: skip
    assert list(steps.begin_s) == sorted(steps.begin_s)
    assert 0 < steps.begin_s[0] < steps.begin_s[-1] < steps.step_s - steps.optimizer_s
    assert steps.on(4).step_s == pytest.approx(steps.step_s - 0.75 * steps.optimizer_s)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("ranks", [2, 4, 24])
@pytest.mark.parametrize(
    "text",
    [
        "fsdp2",
        "qsgd:bits=4",
        "qsgd:bits=4 weights=qsgd:bits=8",
        f"bf16 weights={KEPT}",
        f"bf16 weights={MOVED}",
    ],
)
def test_bytes_are_the_formulas(text: str, ranks: int) -> None:
    """Beyond 8 ranks they are extended from two other sizes."""
    method, _, weights = text.partition(" weights=")
    steps, expected = observed(), 0.0
    for call in steps.calls:
        shard, whole = call.shard(ranks), call.owned(ranks)
        if call.kind == "gather" and not weights:
            expected += (ranks - 1) * 4 * shard.numel
        elif call.kind == "gather" and not (call.in_backward and weights in (KEPT, MOVED)):
            expected += parse_weight_gather(weights).payload_bytes(shard, ranks, call.dtype)
        elif call.kind == "reduce" and method == "fsdp2":
            expected += 2 * (ranks - 1) * 4 * shard.numel  # Gloo's reduce-scatter is its all-reduce
        elif call.kind == "reduce":
            expected += to_shards(parse(method)).payload_bytes(whole, ranks, 0)
    rehearsed = ShardedRehearsals(text, steps).among(ranks)
    found = predict(rehearsed, Machine(steps), Fabric.uniform(ranks, "1gbit"))
    tolerance = 0.05 if ranks > 8 else 1e-6
    assert found.sent_bytes == pytest.approx(expected, rel=tolerance, abs=16)


def profiles(seconds: list[float], core_s: float = 0.0) -> tuple[list[ProfiledExchange], Host]:
    """At 8 Mbit/s between two ranks a sum of 1,448,000 bytes takes 1.547 s."""
    sums = [RequestSizes("ring_all_reduce", (1_448_000 / 1.547 * one,)) for one in seconds]
    host = Host(1, 1, around=Overhead((1.0,), (0.0,), (core_s,)))
    return [ProfiledExchange((ProfiledRound(0.0, ask),), 0.0) for ask in sums], host


def test_on_the_cpu_nothing_overlaps() -> None:
    times_s = [0.4, 0.2, 0.2, 0.3, 0.1, 0.5]
    given, host = profiles(times_s)
    step = sharded_step(observed(), given, Fabric.uniform(2, 8e6), host, slowness=2.0)
    assert step.step_s == pytest.approx(2 * 0.8 + sum(times_s))
    assert step.exposed_s == pytest.approx(sum(times_s))
    assert step.wire_s == pytest.approx(sum(times_s))


def test_gloo_waits_for_the_word_of_who_receives_around_a_ring() -> None:
    """At 8 Mbit/s a window of 64 kB stands in a queue for 66 ms, and 10 kB for 10; a pair waits for half of
    0.1 s on the wire."""
    fabric, window_s = Fabric.uniform(4, 8e6), 8 * (64 << 10) / 8e6
    long, short = (RequestSizes("ring_all_reduce", (4 * nbytes,)) for nbytes in (1e5, 1e4))
    assert long.announced_s(0.3, fabric, True) == pytest.approx(window_s * LATE_IN_A_RING)
    assert short.announced_s(0.03, fabric, True) == pytest.approx(0.01 * LATE_IN_A_RING)
    assert short.announced_s(0.03, fabric, False) == 0.0
    gathered = RequestSizes("ring_all_gather", (1e5,))
    assert gathered.placed(((0, 1), (2, 3))).announced_s(0.1, fabric, False) == 0.05


def test_payloads_wait_for_no_word() -> None:
    fabric = Fabric.uniform(2, 8e6)
    for kind in ("all_gather", "all_to_all", "all_reduce"):
        assert RequestSizes(kind, (1e5, 1e5)).announced_s(0.1, fabric, True) == 0.0


def test_ranks_that_share_a_machine_wait_for_words_and_for_what_an_exchange_takes_of_a_core() -> None:
    given, host = profiles([0.4] * 6)
    crowded = replace(host, ranks=2)
    alone, emulated = (
        sharded_step(observed(), given, Fabric.uniform(2, 8e6), one) for one in (host, crowded)
    )
    word_s = LATE_IN_A_RING * 8 * (64 << 10) / 8e6
    assert emulated.step_s - alone.step_s == pytest.approx(6 * (word_s + 2 * EXCHANGE_CORE_S))
    hooked = [
        replace(one, rounds=(ProfiledRound(0.0, RequestSizes("all_to_all", (8e3,) * 2)),)) for one in given
    ]
    alone, emulated = (
        sharded_step(observed(), hooked, Fabric.uniform(2, 8e6), one) for one in (host, crowded)
    )
    assert emulated.step_s - alone.step_s == pytest.approx(6 * 2 * HOOKED_CORE_S)
    on_gpu = [sharded_step(observed("cuda"), given, Fabric.uniform(2, 8e6), one) for one in (host, crowded)]
    assert on_gpu[0].step_s == pytest.approx(on_gpu[1].step_s)


def test_on_a_gpu_gathers_are_prefetched_and_reductions_pass_beside_backward() -> None:
    """By hand: each gather is asked for when the one before is there, and all share one line."""
    given, host = profiles([0.4, 0.05, 0.2, 0.3, 0.1, 0.5])
    step = sharded_step(observed("cuda"), given, Fabric.uniform(2, 8e6), host)
    there = 0.1 + 0.4  # the first; the second is asked for now
    second = there + 0.1  # there since 0.05 s; asks for the third, which is there at 0.8
    third = max(second + 0.1, second + 0.2)  # asks for the fourth, there 0.1 s later
    reduced = third + 0.1 + 0.3  # computing reaches the reduction when the fourth gather has left the line
    fourth = third + 0.2  # was there long ago
    last = max(reduced, fourth + 0.1) + 0.5
    assert step.step_s == pytest.approx(last + 0.2)


def test_models_are_averaged_after_the_step_in_their_share_of_steps() -> None:
    given, host = profiles([0.0] * 6 + [1.0])
    given[-1] = replace(given[-1], share=0.25)
    step = sharded_step(observed(), given, Fabric.uniform(2, 8e6), host)
    assert step.step_s == pytest.approx(0.8 + 0.25)


def test_replicas_exchange_what_is_left_of_a_reduction() -> None:
    """Two islands of two: FSDP inside, bits across; a ring goes around each island."""
    steps, fabric = observed(), Fabric.uniform(4, "100mbit")
    plain, packed, rare = (
        profile_sharded(text, steps, 4, 2) for text in ("fsdp2", "qsgd:bits=4", "diloco:period=50")
    )
    inside = [call.shard(2).numel * 4 for call in steps.calls]  # of n = 2: a gather sends one shard
    reductions = [2 if call.kind == "reduce" else 1 for call in steps.calls]  # Gloo's, twice
    fsdp = sum(times * nbytes for times, nbytes in zip(reductions, inside, strict=True))
    shards = [call.shard(2) for call in steps.calls if call.kind == "reduce"]
    across = sum(4 * shard.numel for shard in shards)
    machine = Machine(steps)
    assert predict(plain, machine, fabric).sent_bytes == pytest.approx(fsdp + across)
    few = predict(packed, machine, fabric).sent_bytes - fsdp
    assert across / 9 < few < across / 5
    assert predict(rare, machine, fabric).sent_bytes == pytest.approx(fsdp + across / 50, rel=0.01)
    groups = {round_.ask.groups for profile in packed.profiles for round_ in profile.rounds}
    assert groups == {((0, 1), (2, 3)), ((0, 2), (1, 3))}
    assert profile_sharded("powersgd:rank=2", steps, 4, 2).profiles[3].rounds[-1].ask.groups == (
        (0, 2),
        (1, 3),
    )


@pytest.mark.parametrize(
    ("text", "ranks", "shards", "words"),
    [
        ("ddp", 4, 4, "this model is sharded"),
        ("fsdp2 weights=qsgd:bits=8", 4, 4, "write identity weights=qsgd:bits=8"),
        ("qsgd:bits=4 weights=qsgd:bits=8", 4, 2, "leave weights= out"),
        ("diloco", 4, 4, "fewer shards than ranks"),
        ("codistill", 4, 2, "exchanges predictions"),
        ("qsgd weights=gather:compressor=bf16,keep_frozen=true", 4, 4, "keep_frozen is not predicted"),
        ("qsgd:bits=4 weights=topk:ratio=0.1", 4, 4, "leaves out most values"),
        ("identity", 4, 3, "no whole number of replicas"),
    ],
)
def test_what_is_not_served_is_refused(text: str, ranks: int, shards: int, words: str) -> None:
    with pytest.raises(DistcompError, match=words):
        profile_sharded(text, observed(), ranks, shards)


LOOP = """\
import torch, torch.distributed as dist, distcomp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for part in (*model, model):
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
handle = distcomp.attach(model, optimizer, "qsgd:bits=4", weights="qsgd:bits=8")
while True:
    optimizer.zero_grad()
    model(torch.ones(4, 256)).square().mean().backward()
    optimizer.step()
"""


def test_advise_reads_a_sharded_loop_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(LOOP)
    asked = ["advise", "--ranks", "4", "--rate", "1mbit", "--json"]
    methods = ["--methods", "qsgd:bits=4; qsgd:bits=4 weights=qsgd:bits=8"]
    assert cli.main([*asked, *methods, "--model", str(script)]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert everything["recommended"] == "qsgd:bits=4 weights=qsgd:bits=8"
    rows = {row["method"]: row["prediction"]["sent_bytes"] for row in everything["methods"]}
    numel = 2 * (256 * 256 + 256)
    assert everything["parameters"] == numel
    assert rows["fsdp2"] / numel == pytest.approx(12, rel=0.01)
    assert rows["qsgd:bits=4 weights=qsgd:bits=8"] / numel == pytest.approx(1.91, rel=0.03)
    assert cli.main([*asked, "--shards", "2", "--methods", "qsgd:bits=4", "--model", str(script)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in found["methods"]} == {"fsdp2", "qsgd:bits=4"}
    assert "plain FSDP2" in found["sentence"]


def test_a_training_task_is_sharded_where_it_is_asked() -> None:
    fabric = Fabric.uniform(4, "100kbit")
    wide = task(nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 8)))
    advice = advise(wide, fabric, ("identity", "identity weights=qsgd:bits=8"), shards=4)
    assert advice.baseline == "fsdp2"
    assert advice.best.method == "identity weights=qsgd:bits=8"
    with pytest.raises(DistcompError, match="of an FSDP2 model"):
        advise(task(), fabric, ("identity weights=qsgd:bits=8",))


# ----------------------------------------------------------------------------------------------- simulated


def simulated(method: str, weights: str | None, workers: int, sharded: bool = True) -> Simulation:
    setting = Setting(
        Fabric.uniform(workers, "10mbit", "5ms"), Scenario(compute_s=0.5), sharded=sharded,
        weights=parse_weight_gather(weights) if weights else None,
    )  # fmt: skip
    one = Simulation(task(), parse(method), setting)
    for _ in range(4):
        one.step()
    return one


def test_a_model_held_together_trains_as_one_that_each_holds() -> None:
    """Rows do not divide: 16 and 3 over 5 workers."""
    whole, shards = simulated("identity", None, 5, sharded=False), simulated("identity", None, 5)
    assert torch.allclose(whole.models, shards.models, atol=1e-6)
    assert torch.equal(shards.models[0], shards.models[4])
    whole, shards = (simulated("powersgd:rank=2", None, 3, sharded) for sharded in (False, True))
    assert torch.allclose(whole.models, shards.models, atol=1e-5)


@pytest.mark.parametrize("weights", ["qsgd:bits=8", KEPT, MOVED])
def test_simulated_bytes_and_weights_are_those_of_the_gather(weights: str) -> None:
    one, exact = simulated("qsgd:bits=8", weights, 4), simulated("qsgd:bits=8", None, 4)
    slices = [("0.weight", (4, 8)), ("0.bias", (4,)), ("1.weight", (4,)), ("1.bias", (4,))]
    slices += [("2.weight", (1, 16)), ("2.bias", (1,))]
    shard = Layout.of(slices, {"1.weight": "norm", "1.bias": "norm"})
    reduced = to_shards(parse("qsgd:bits=8")).payload_bytes(
        Layout.of([(str(owner), (shard.numel, 1)) for owner in range(4)]), 4, 0
    )
    gathered = parse_weight_gather(weights).payload_bytes(shard, 4, torch.float32)
    sent = {"qsgd:bits=8": 8 * gathered, KEPT: 4 * gathered}.get(
        weights, 3 * gathered + 3 * (4 * shard.numel + 32)
    )
    assert one.sent_bytes == pytest.approx(4 * reduced + sent, rel=0.02)
    assert 1e-6 < (one.models[0] - exact.models[0]).abs().max() < 0.05
    assert one.seconds > 4 * 0.5


def test_simulate_has_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom distcomp.advice import TrainingTask\ndef training_task(arguments):\n"
        "    def batch(worker, workers, step):\n        return torch.ones(4, 8), torch.ones(4, 8)\n"
        "    return TrainingTask(torch.nn.Linear(8, 8), batch, torch.nn.functional.mse_loss,\n"
        "                        lambda p: torch.optim.SGD(p, 0.1))\n"
    )
    asked = ["simulate", "--workers", "4", "--method", "qsgd:bits=4", "--steps", "2"]
    given = [*asked, "--sharded", "--weights", "qsgd:bits=8", str(script)]
    assert cli.main(given) == 0
    assert "step     2" in capsys.readouterr().out
    assert cli.main([*asked, "--weights", "qsgd:bits=8", str(script)]) == 2
    assert "give --sharded" in capsys.readouterr().err
    with pytest.raises(DistcompError, match="averages models"):
        simulated("diloco", None, 4)


def test_a_setting_is_read_as_it_is_attached() -> None:
    setting = ShardedSetting.of("qsgd:bits=4 weights=qsgd:bits=8")
    assert (setting.method, setting.weights) == (parse("qsgd:bits=4"), parse_weight_gather("qsgd:bits=8"))
    assert Placement.of(8, 8).inside is None
    assert Placement.of(8, 4).across == ((0, 4), (1, 5), (2, 6), (3, 7))
