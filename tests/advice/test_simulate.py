"""Workers in lock-step on a virtual clock: the numerics of many, the time of a network."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distcomp import cli
from distcomp.advice import Scenario, Setting, Simulation, TrainingTask
from distcomp.advice.scenario import Down, Slow
from distcomp.errors import DistcompError
from distcomp.methods import parse
from distcomp.network import Fabric
from distcomp.network.model import all_gather_load, neighbor_exchange, ring_all_reduce

RATE = 0.2


def batch(worker: int, workers: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1000 * worker + step))
    return x, x[:, :3].argmax(1)


def training_task(model: nn.Module | None = None, **changes: Any) -> TrainingTask:
    torch.manual_seed(0)
    net = model or nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    given: dict[str, Any] = {
        "model": net, "batch": batch, "loss": cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, RATE, momentum=0.9),
    }  # fmt: skip
    return TrainingTask(**{**given, **changes})


def simulation(method: str, workers: int = 4, scenario: Scenario | None = None, **changes: Any) -> Simulation:
    setting = Setting(Fabric.uniform(workers, "10mbit", "5ms"), scenario or Scenario())
    return Simulation(training_task(**changes), parse(method), setting)


def trained(one: Simulation, steps: int) -> Simulation:
    for _ in range(steps):
        one.step()
    return one


def test_the_exact_mean_is_one_worker_with_all_batches() -> None:
    """What every worker holds after six steps of identity, against plain PyTorch on the joined batch."""
    many = trained(simulation("identity", 5), 6)
    model = deepcopy(training_task().model)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    for step in range(6):
        x, y = (torch.cat(parts) for parts in zip(*(batch(w, 5, step) for w in range(5)), strict=True))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for row in many.models:
        assert torch.allclose(row, flat, atol=1e-5)


@pytest.mark.parametrize("method", ["local_sgd:period=3", "dcd", "qsgd:bits=4"])
def test_gradients_of_many_at_once_are_those_of_each_alone(method: str) -> None:
    together, alone = simulation(method), simulation(method)
    alone.batched = False
    trained(together, 5)
    trained(alone, 5)
    assert together.batched
    assert torch.allclose(together.models, alone.models, atol=1e-4)


def test_workers_train_apart_between_exchanges_and_agree_at_them() -> None:
    one = trained(simulation("local_sgd:period=3"), 2)
    assert one.evaluate()["spread"] > 1e-3
    assert trained(one, 1).evaluate()["spread"] < 1e-6


def test_bytes_are_those_of_the_method() -> None:
    one = trained(simulation("qsgd:bits=8", 4), 3)
    assert one.sent_bytes == 3 * parse("qsgd:bits=8").payload_bytes(one.layout, 4, 0)


def test_the_clock_adds_computing_and_the_ring() -> None:
    one = simulation("identity", 8, Scenario(compute_s=0.5))
    fabric = Fabric.uniform(8, "10mbit", "5ms")
    trained(one, 3)
    sum_s = ring_all_reduce(4 * one.layout.numel, tuple(range(8)), fabric).cost(fabric).seconds
    direct_s = all_gather_load([4 * one.layout.numel] * 8, tuple(range(8)), fabric).cost(fabric).seconds
    expected = direct_s if 4 * one.layout.numel <= 8192 else sum_s
    assert one.seconds == pytest.approx(3 * (0.5 + expected))


def test_gossip_waits_for_neighbours_only() -> None:
    """Worker 0 of a ring of 8 is slow: after one step its neighbours have waited, the others have not."""
    scenario = Scenario(compute_s=1.0, slow=(Slow((0,), 10.0),))
    fabric = Fabric.uniform(8, "10mbit", "5ms")
    one = trained(simulation("dpsgd", 8, scenario), 1)
    edges = [(i, (i + 1) % 8) for i in range(8)]
    sent = one.net.ledgers[0].total_bytes / 2
    exchange_s = neighbor_exchange(sent, edges, fabric).cost(fabric).seconds
    slow = [10 + exchange_s] * 2
    assert one.clock.now_s.tolist() == pytest.approx([slow[0], slow[0], *[1 + exchange_s] * 5, slow[1]])
    everybody = trained(simulation("identity", 8, scenario), 1)
    assert everybody.clock.now_s.min() > 10


def test_stragglers_are_drawn_alike_whenever_they_are_asked_for() -> None:
    scenario = Scenario(compute_s=1.0, seed=3, straggler_chance=0.25, straggler_factor=5.0)
    times = scenario.computing_s(7, 4000)
    assert (times == scenario.computing_s(7, 4000)).all()
    assert set(times.tolist()) == {1.0, 5.0}
    assert (times == 5.0).mean() == pytest.approx(0.25, abs=0.03)
    assert (times != scenario.computing_s(8, 4000)).any()


def test_a_sum_waits_for_a_link_that_is_down_and_gossip_goes_on() -> None:
    scenario = Scenario(compute_s=1.0, down=(Down((2,), 0.5, 30.0),))
    assert trained(simulation("identity", 6, scenario), 1).clock.now_s.min() > 30
    on = trained(simulation("deepsqueeze:on_failure='continue'", 6, scenario), 3)
    assert on.clock.now_s.max() < 10
    alone = trained(simulation("none", 6), 3)
    assert torch.allclose(on.models[2], alone.models[2], atol=1e-6)  # it heard nobody
    assert not torch.allclose(on.models[1], alone.models[1], atol=1e-3)


def test_a_scenario_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(
        'seed = 4\ncompute = "20ms"\n[stragglers]\nchance = 0.5\nfactor = 3\n'
        '[[slow]]\nranks = [1]\nfactor = 2\n[[down]]\nranks = [0]\nbegin = "1s"\nend = "2s"\n'
    )
    expected = Scenario(0.02, 4, 0.5, 3.0, (Slow((1,), 2.0),), (Down((0,), 1.0, 2.0),))
    assert Scenario.from_toml(path) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("speed = 1", "'speed'"),
        ("[stragglers]\nchance = 2\nfactor = 1", "chance"),
        ("[[slow]]\nranks = [1]", "factor"),
        ("[[", "TOML"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(DistcompError, match=word):
        Scenario.from_toml(path)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(DistcompError, match="BatchNorm"):
        simulation("identity", model=nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
    with pytest.raises(DistcompError, match="LBFGS may look at a whole parameter"):
        simulation("identity", optimizer=lambda parameters: torch.optim.LBFGS(list(parameters)))
    with pytest.raises(DistcompError, match="worker 9"):
        simulation("identity", scenario=Scenario(slow=(Slow((9,), 2.0),)))


SCRIPT = """\
import torch
from torch.nn.functional import mse_loss
from distcomp.advice import TrainingTask

def training_task(arguments):
    torch.manual_seed(int(arguments[0]))
    model = torch.nn.Linear(4, 2)
    def batch(worker, workers, step):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(worker + 100 * step))
        return x, x[:, :2]
    return TrainingTask(model, batch, mse_loss, lambda parameters: torch.optim.SGD(parameters, 0.1),
                   lambda model: {"test_loss": model.weight.square().mean().item()})
"""


def test_the_command_trains_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distcomp import recording

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    where = tmp_path / "run"
    given = ["simulate", "--workers", "6", "--rate", "1mbit", "--method", "choco", "--steps", "6"]
    status = cli.main([*given, "--eval-every", "3", "-o", str(where), str(script), "7"])
    assert status == 0
    assert "6 workers of 10 parameters, choco: simulated" in capsys.readouterr().out
    run = recording.read_run(where)
    assert run.about["simulated"] is True
    assert [one["step"] for one in run.of_kind("metric")] == [3, 6]
    assert run.of_kind("metric")[1]["train_s"] > run.of_kind("metric")[0]["train_s"] > 0
    assert cli.main([*given, "--eval-every", "3", "--json", str(script), "7"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [{**one, "seconds": one["train_s"]} for one in run.of_kind("metric")]
    assert [{name: one[name] for name in ("step", "seconds")} for one in told] == [
        {name: one[name] for name in ("step", "seconds")} for one in kept
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [("x = 1", "define training_task"), ("def training_task(arguments): return 3", "returned a int")],
)
def test_a_script_without_a_problem_is_told_what_to_define(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    assert cli.main(["simulate", "--workers", "2", "--method", "bf16", str(script)]) == 2
    assert words in capsys.readouterr().err
