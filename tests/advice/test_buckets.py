"""Which bucket size: DistributedDataParallel's own buckets, what is predicted of them, and the sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcomp import cli
from distcomp.advice import BucketAdvice, Machine, TrainingTask, advise_buckets, buckets
from distcomp.advice.advise import advise
from distcomp.advice.buckets import MIB, BucketRow, bucket_plans, cut
from distcomp.attaching.observe import ObservedGradient, ObservedSteps, observe, only_rank, silenced
from distcomp.attaching.observe_shards import ObservedShardedSteps, ShardedCall
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.network import Fabric
from distcomp.network.model import Host
from distcomp.network.request_sizes import RequestSizes

FLOAT = torch.float32


def gradients(*told: tuple[int, float], dtype: torch.dtype = FLOAT) -> tuple[ObservedGradient, ...]:
    """Vectors of so many elements, ready at these moments."""
    params = Layout.of([(f"p{at}", (numel,)) for at, (numel, _) in enumerate(told)]).slices
    return tuple(
        ObservedGradient(param, dtype, ready_s) for param, (_, ready_s) in zip(params, told, strict=True)
    )


def observed(*told: tuple[int, float], step_s: float = 0.0) -> ObservedSteps:
    """In the default's buckets."""
    found = gradients(*told)
    one = ObservedSteps((), (found[-1].ready_s,), step_s or found[-1].ready_s, found)
    plan = bucket_plans(one)[0]
    return replace(one, layouts=plan.layouts, ready_s=plan.ready_s)


# ------------------------------------------------------------------------------ which buckets there would be


def stepped(ddp: DistributedDataParallel, width: int, dtype: torch.dtype = FLOAT) -> ObservedSteps:
    def step() -> None:
        ddp.zero_grad()
        ddp(torch.ones(2, width, dtype=dtype)).float().square().mean().backward()

    return observe(ddp, step, 1)


class Mixed(nn.Module):
    """Layers of two types in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(16, 16, dtype=torch.bfloat16 if at % 2 else FLOAT) for at in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


@pytest.mark.parametrize("cap_mb", [0.0001, 0.001, 0.003, 0.02, None])
def test_buckets_are_those_that_distributed_data_parallel_makes(cap_mb: float | None) -> None:
    net = nn.Sequential(
        nn.Linear(8, 40), nn.Linear(40, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 300)
    )
    with only_rank():
        by_default = stepped(DistributedDataParallel(net), 8)
        given_ = stepped(DistributedDataParallel(net, bucket_cap_mb=cap_mb), 8)
    caps = [MIB, 25 * MIB] if cap_mb is None else [int(cap_mb * MIB)]
    made = [Layout(tuple(one.param for one in bucket)) for bucket in cut(by_default.gradients, caps)]
    assert made == list(given_.layouts)


def test_the_defaults_first_bucket_is_smaller() -> None:
    net = nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(4)))
    with only_rank():
        found = stepped(DistributedDataParallel(net), 600)
    assert [layout.names for layout in found.layouts] == [
        ("3.weight",),
        ("2.weight", "1.weight", "0.weight"),
    ]
    plans = bucket_plans(found)
    assert plans[0].layouts == found.layouts
    assert [plan.cap_mb for plan in plans] == [None, 0.5, 2, 4, 6]
    assert [len(plan.layouts) for plan in plans] == [2, 4, 2, 2, 1]


def test_gradients_of_two_types_never_share_a_bucket() -> None:
    with only_rank():
        given_ = stepped(DistributedDataParallel(Mixed(), bucket_cap_mb=0.0012), 16)
    made = cut(given_.gradients, [int(0.0012 * MIB)])
    assert [Layout(tuple(one.param for one in bucket)) for bucket in made] == list(given_.layouts)
    assert {one.nbytes for one in given_.gradients} == {1024, 64, 512, 32}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.sampled_from([FLOAT, torch.bfloat16])), min_size=1),
    caps=st.tuples(st.integers(1, 500), st.integers(1, 500)),
)
def test_a_bucket_is_full_as_soon_as_it_holds_its_cap(
    sizes: list[tuple[int, torch.dtype]], caps: tuple[int, int]
) -> None:
    """Nothing is lost, every bucket but the last of its type is full and was not before its last member, and
    a larger cap never makes more buckets."""
    told = [
        replace(gradients((numel, 0.0), dtype=dtype)[0], ready_s=float(at))
        for at, (numel, dtype) in enumerate(sizes)
    ]
    made = cut(told, caps[:1])
    assert sorted(one.ready_s for bucket in made for one in bucket) == [one.ready_s for one in told]
    for dtype in {one.dtype for one in told}:
        own = [bucket for bucket in made if bucket[0].dtype == dtype]
        assert [one for bucket in own for one in bucket] == [one for one in told if one.dtype == dtype]
        assert all(sum(one.nbytes for one in bucket) >= caps[0] for bucket in own[:-1])
        assert all(sum(one.nbytes for one in bucket[:-1]) < caps[0] for bucket in own)
    small, large = sorted(caps)
    assert len(cut(told, [large])) <= len(cut(told, [small]))


# -------------------------------------------------------------------------------- when each gradient is there


def test_gradients_are_watched_one_by_one_until_the_end() -> None:
    """They come from the last layer to the first, each before its bucket; afterwards nobody listens."""
    moments = iter(range(10**6))
    with only_rank():
        ddp = DistributedDataParallel(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))))
        ddp(torch.ones(1, 8)).sum().backward()
        with silenced(ddp, lambda: float(next(moments))) as watcher:
            ddp(torch.ones(1, 8)).sum().backward()
            seen = watcher.take(0.0, 100.0)
        ddp(torch.ones(1, 8)).sum().backward()
        assert watcher.take(0.0, 1.0).gradients == {}
    assert list(seen.gradients) == ["2.weight", "1.weight", "0.weight"]
    assert seen.step_s == 100.0
    assert max(seen.gradients.values()) < seen.buckets[-1][1]


class Unused(nn.Module):
    """One of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.used(x)
        return found


def test_what_is_not_used_is_there_with_its_bucket() -> None:
    with only_rank():
        found = stepped(DistributedDataParallel(Unused(), find_unused_parameters=True), 8)
    ready = {one.param.name: one.ready_s for one in found.gradients}
    assert ready["unused.weight"] == ready["unused.bias"] == found.ready_s[-1]
    assert ready["used.weight"] <= found.ready_s[-1]


# --------------------------------------------------------------------------------------- what is predicted

VALUES = 362_000
"""1,448,000 bytes: 1.547 s around a ring of two at 8 Mbit/s."""


def two_layers(fabric: Fabric, exchange_s: float = 0.0) -> BucketAdvice:
    """Ready at 1 s and at 2 s."""
    machine = Machine(observed((VALUES, 1.0), (VALUES, 2.0)), Host(exchange_s=exchange_s))
    return advise_buckets("ddp", machine, fabric)


def test_buckets_by_hand() -> None:
    """In two, the first crosses while backward goes on; with a delay of a second, each hop counts twice."""
    near = two_layers(Fabric.uniform(2, 8e6))
    assert [row.buckets for row in near.rows] == [2, 2, 1]
    assert near.now.step_s == pytest.approx(1.0 + 2 * 1.547, abs=0.05)
    assert near.rows[-1].step_s == near.first_step_s == pytest.approx(2.0 + 2 * 1.547, abs=0.05)
    assert near.best is near.now
    far = two_layers(Fabric.uniform(2, 8e6, 1.0))
    assert far.now.step_s == pytest.approx(1.0 + 2 * (1.547 + 2.0), abs=0.05)
    assert far.best.step_s == pytest.approx(2.0 + 2 * 1.547 + 2.0, abs=0.05)
    assert far.best.cap_mb == 2  # the second gradient fills it


def test_what_an_exchange_takes_of_a_core_counts_in_every_bucket() -> None:
    fabric = Fabric.uniform(2, 8e9)
    free, dear = two_layers(fabric), two_layers(fabric, exchange_s=5.0)
    assert free.now.step_s == pytest.approx(2.0, abs=0.05)
    assert dear.now.step_s == pytest.approx(1.0 + 2 * 5.0, abs=0.05)
    assert (dear.best.buckets, dear.best.step_s) == (1, pytest.approx(7.0, abs=0.05))
    ask = RequestSizes("all_gather", (10.0, 10.0)).exchange(fabric)
    assert ask.cost(fabric, Host(exchange_s=0.5)).core_s == 0.5
    alone = Fabric.uniform(1)
    assert RequestSizes("all_gather", (10.0,)).exchange(alone).cost(alone, Host(exchange_s=0.5)).core_s == 0


@settings(max_examples=15, deadline=None)
@given(
    numels=st.lists(st.integers(1, 2000), min_size=1, max_size=8),
    delay_s=st.floats(0, 0.1),
    exchange_s=st.floats(0, 0.01),
)
def test_what_is_advised_is_never_slower_than_what_there_is(
    numels: list[int], delay_s: float, exchange_s: float
) -> None:
    """And nothing else is much faster; and no step is shorter than the model computes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buckets, "CAPS_MB", (0.001, 0.004, 0.01))
        told = [(numel, 0.01 * (at + 1)) for at, numel in enumerate(numels)]
        machine = Machine(observed(*told), Host(exchange_s=exchange_s))
        advice = advise_buckets("bf16", machine, Fabric.uniform(4, "10mbit", delay_s))
    assert advice.best.step_s <= advice.now.step_s
    assert advice.best.step_s <= 1.05 * 1.01 * min(row.step_s for row in advice.rows)
    assert min(row.step_s for row in advice.rows) >= machine.timing.step_s - 1e-9
    assert advice.rows[-1].buckets == 1
    assert advice.default


# ---------------------------------------------------------------------------------------------- the sentence


def said(noise: float = 0.0, default: bool = True, cap_mb: float | None = 8) -> BucketAdvice:
    now, fast = BucketRow(None, 2, 0.118), BucketRow(cap_mb, 3, 0.096)
    alike = BucketRow(1, 9, 0.0955)  # by less than 1 %
    return BucketAdvice("powersgd:rank=4", (now, alike, fast), now, default, noise)


def test_the_sentence_names_the_size_and_both_times() -> None:
    assert said().sentence == (
        "Give DistributedDataParallel bucket_cap_mb=8: with powersgd:rank=4 predicted 96 ms a step in 3 "
        "buckets, instead of 118 ms in 2 by default."
    )
    assert said(default=False).sentence.endswith("instead of 118 ms in 2 now.")
    assert said(default=False, cap_mb=None).sentence.startswith(
        "Give DistributedDataParallel no bucket_cap_mb: with"
    )
    assert said(noise=0.3).sentence == (
        "Leave bucket_cap_mb as it is: powersgd:rank=4 takes 118 ms a step in 2 buckets, and no other size "
        "is predicted to be faster by 30%."
    )
    assert said().as_json()["bucket_cap_mb"] == 8
    assert said(noise=0.3).as_json()["bucket_cap_mb"] is None


def test_of_as_many_buckets_alike_the_default_is_advised() -> None:
    """However the noise of the moment falls: both may be the same buckets, predicted twice."""
    now, default, named = BucketRow(0.001, 8, 0.4), BucketRow(None, 1, 0.1001), BucketRow(0.5, 1, 0.1)
    assert BucketAdvice("bf16", (default, named), now, False).best is default


LOOP = """\
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
layers = [torch.nn.Linear(64, 64) for _ in range(8)]
model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.001)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
while True:
    optimizer.zero_grad()
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
"""


def test_the_command_tells_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight buckets, each of them 6 hops of 50 ms, where one would do."""
    script = tmp_path / "train.py"
    script.write_text(LOOP)
    asked = ["advise", "--ranks", "4", "--rate", "1gbit", "--delay", "50ms", "--methods", "bf16"]
    assert cli.main([*asked, "--model", str(script)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Give DistributedDataParallel no bucket_cap_mb: with" in told
    assert "in 8 now." in told
    assert cli.main([*asked, "--json", "--model", str(script)]) == 0
    everything = json.loads(capsys.readouterr().out)["buckets"]
    assert everything["now"]["buckets"] == 8
    assert everything["best"]["buckets"] == 1
    assert everything["sentence"].startswith("Give DistributedDataParallel")


def training_task() -> TrainingTask:
    def batch(worker: int, workers: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(4, 64), torch.ones(4, 64)

    return TrainingTask(nn.Linear(64, 64), batch, nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1))


def test_what_exchanges_models_has_no_buckets() -> None:
    slow = Fabric.uniform(4, "1mbit")
    far = advise(training_task(), slow, ("dcd:period=20",))
    assert far.best.method == "dcd:period=20"
    assert far.buckets is None
    near = advise(training_task(), slow, ("bf16",))
    assert near.buckets is not None
    assert near.buckets.now.step_s == near.best.prediction.step_s  # one figure in the table and the sentence
    assert near.buckets.sentence.startswith("Leave bucket_cap_mb as it is: bf16 takes")


def test_mistakes_are_told_with_a_remedy() -> None:
    fabric = Fabric.uniform(2, "1gbit")
    whole = observed((10, 0.1))
    reduced = ShardedCall("reduce", whole.layouts[0], FLOAT, True, "cpu")
    sharded = ObservedShardedSteps((reduced,), (0.1,), 0.2, 0.0)
    with pytest.raises(DistcompError, match=r"dcd exchanges models after a step.* leave it out"):
        advise_buckets("dcd", Machine(whole), fabric)
    with pytest.raises(DistcompError, match=r"not watched one by one; use distcomp\.attaching\.observe"):
        advise_buckets("bf16", Machine(replace(whole, gradients=())), fabric)
    with pytest.raises(DistcompError, match=r"no buckets; FSDP2 exchanges what fully_shard was called on"):
        advise_buckets("bf16", Machine(sharded), fabric)
