"""Experts on each rank or spread over them: what is found in a model, and what is predicted of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from distcomp import cli
from distcomp.advice import Mixture, TrainingTask, advise_experts
from distcomp.advice.mixtures import coded_s, with_experts, without_experts
from distcomp.advice.waiting import waiting_step_s
from distcomp.attaching.observe import ObservedSteps
from distcomp.attaching.observe_waits import Wait, WaitingStep
from distcomp.conditional import MixtureOfExperts
from distcomp.conditional.expert_traffic import SMALL_CALLS, MixtureShape, step_calls
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.network import Fabric

WIDTH, HIDDEN, EXPERTS = 32, 512, 8


def task(tokens: int) -> TrainingTask:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), MixtureOfExperts(WIDTH, HIDDEN, EXPERTS, 2))

    def batch(worker: int, workers: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(tokens, WIDTH), torch.ones(tokens, WIDTH)

    return TrainingTask(model, batch, mse_loss, lambda p: torch.optim.SGD(p, 0.1))


def test_few_tokens_are_sent_and_many_are_not() -> None:
    """The break-even of E H / k is 2,048 tokens."""
    fabric = Fabric.uniform(2, "2mbit")
    few = advise_experts(task(64), fabric, methods=("ddp",))
    assert few is not None
    assert few.mixtures[0].parameters == ("1.up", "1.up_bias", "1.down", "1.down_bias")
    assert few.mixtures[0].shape == MixtureShape(64, WIDTH, HIDDEN, EXPERTS, 2, 2)
    assert few.rows[0].held == "spread"
    assert few.sentence.startswith("Spread the experts over the ranks (rows by ")
    here = next(row for row in few.rows if row.held == "all here")
    plain = next(row for row in few.rows if row.rows == "identity")
    # At this rate a step is its bytes: experts' gradients there, rows here, and the same rest in both.
    assert here.step_s == pytest.approx(8 * here.sent_bytes / 2e6, rel=0.1)
    assert plain.experts_bytes == 4 * few.mixtures[0].shape.row_values
    assert here.experts_bytes == pytest.approx(4 * few.mixtures[0].shape.gradient_values, rel=0.01)
    assert here.sent_bytes - here.experts_bytes == plain.sent_bytes - plain.experts_bytes
    many = advise_experts(task(4096), fabric, methods=("ddp",))
    assert many is not None
    plain = next(row for row in many.rows if row.rows == "identity")
    here = next(row for row in many.rows if row.held == "all here")
    assert here.step_s < plain.step_s
    packed = [row.experts_bytes for row in many.rows if row.rows == "qsgd:bits=8"]
    assert packed[0] < 0.28 * plain.experts_bytes


def test_a_slow_answer_costs_each_small_exchange() -> None:
    shape = MixtureShape(64, WIDTH, HIDDEN, EXPERTS, 2, 2)
    step = WaitingStep(0.0, tuple(Wait(ask) for ask in step_calls(shape, "identity")))
    near, far = (waiting_step_s(step, Fabric.uniform(2, "1gbit", d)) for d in ("0ms", "5ms"))
    assert far - near == pytest.approx((SMALL_CALLS + 4) * 5e-3)


def test_buckets_with_and_without_the_experts() -> None:
    first = Layout.of([("head.weight", (4, 4)), ("moe.up", (2, 4, 8))])
    observed = ObservedSteps((first, Layout.of([("moe.down", (2, 8, 4))])), (1.0, 2.0), 3.0)
    known = Mixture(("moe.*",), MixtureShape(8, 4, 8, 2, 1, 2))
    rest = without_experts(observed, [known])
    assert [layout.names for layout in rest.layouts] == [("head.weight",)]
    assert rest.ready_s == (1.0,)
    assert with_experts(observed, [known]) is observed
    again = with_experts(rest, [known])
    assert again.ready_s == (1.0, 1.0)
    assert again.layouts[1].numel == known.shape.expert_values


def test_coding_takes_time() -> None:
    shape = MixtureShape(512, WIDTH, HIDDEN, EXPERTS, 2, 2)
    assert coded_s(shape, "qsgd:bits=8") > 0


def test_a_model_without_experts_and_experts_that_do_not_divide() -> None:
    plain = TrainingTask(nn.Linear(4, 4), lambda *_: (torch.ones(2, 4), torch.ones(2, 4)), mse_loss,
                         lambda p: torch.optim.SGD(p, 0.1))  # fmt: skip
    assert advise_experts(plain, Fabric.uniform(2, "1mbit")) is None
    three = advise_experts(task(8), Fabric.uniform(3, "1mbit"), methods=("ddp",))
    assert three is not None
    assert [row.held for row in three.rows] == ["all here"]
    assert three.sentence.startswith("8 experts do not divide among 3 ranks")
    named = Mixture.parse("parameters=no.*,tokens=8,width=4,hidden=4,experts=2,k=1")
    with pytest.raises(DistcompError, match=r"no parameter is called 'no\.\*'; the model has bias, weight"):
        advise_experts(plain, Fabric.uniform(2, "1mbit"), [named])


@pytest.mark.parametrize("text", ["experts=8", "parameters=a.*,tokens=0,width=4,hidden=4,experts=2,k=1", "x"])
def test_a_mixture_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DistcompError, match=r"describes no mixture .*; write parameters="):
        Mixture.parse(text)


SCRIPT = """\
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import distcomp
from distcomp.conditional import MixtureOfExperts, keep_experts_local

if __name__ == "__main__":
    dist.init_process_group("gloo")
    own = MixtureOfExperts(32, 512, 8, parallel=dist.group.WORLD)
    inner = nn.Sequential(nn.Linear(32, 32), own)
    keep_experts_local(inner)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), 0.1)
    with distcomp.attach(model, optimizer, "qsgd:bits=8"):
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.ones(16, 32)).square().mean().backward()
            optimizer.step()
"""


def test_the_command_finds_spread_experts_in_a_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    common = ["advise", "--ranks", "2", "--rate", "1mbit", "--methods", "bf16", "--model", str(script)]
    assert cli.main([*common[:-2], "--json", *common[-2:]]) == 0
    experts = json.loads(capsys.readouterr().out)["experts"]
    assert experts["mixtures"][0]["tokens"] == 16
    assert experts["sentence"].startswith("Spread the experts over the ranks")
    here = next(way for way in experts["ways"] if way["held"] == "all here" and way["method"] == "ddp")
    assert here["experts_bytes"] > 1e6  # although DDP was told to leave them alone
    assert cli.main(common) == 0
    told = capsys.readouterr().out
    assert "1 mixture of experts:" in told
    assert "Spread the experts over the ranks" in told
