"""``distcomp simulate``: a thousand workers in one process, on a network that does not exist."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcomp import recording
from distcomp.cli import methods as catalogue
from distcomp.cli.fabrics import add_fabric, fabric_of
from distcomp.cli.plugins import add_import, import_plugins
from distcomp.cli.run import existing, new_directory
from distcomp.errors import DistcompError

if TYPE_CHECKING:
    from distcomp.advice import RoundsSimulation, Setting, Simulation, TrainingTask

DESCRIPTION = """\
Train what SCRIPT's training_task() describes with many workers in one
process, in lock-step: real numerics, virtual time. Seconds are those that the
network model predicts for the fabric; computing takes what the scenario says.
With --sharded all workers hold one model together, as with FSDP2: --weights
says how they gather it, for instance qsgd:bits=8.
Averaging with on_failure=continue (diloco:on_failure=continue) is simulated
round by round: who is late, dies or joins, by the scenario, and the goodput.
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "simulate", help="train a thousand workers in one process", description=DESCRIPTION,
        formatter_class=plain,
    )  # fmt: skip
    add_fabric(parser, "--workers")
    parser.add_argument("--method", required=True, help="what carries gradients or models")
    parser.add_argument("--sharded", action="store_true", help="one model, of which each holds a shard")
    parser.add_argument("--weights", metavar="GATHER", help="how shards are gathered (default as they are)")
    add_import(parser)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of training (default 200)")
    parser.add_argument("--eval-every", type=int, default=20, metavar="N", help="steps (default 20)")
    parser.add_argument("--compute", default="20ms", metavar="TIME", help="of a step (default 20ms)")
    parser.add_argument("--scenario", type=Path, metavar="FILE", help="stragglers and failures, in TOML")
    parser.add_argument("--seed", type=int, default=0, help="of the method's random rounding")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="record the run in this directory")
    parser.add_argument("--json", action="store_true", help="print each evaluation as a line of JSON")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a script that defines training_task()")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, print, record."""
    from distcomp.advice import Scenario, Setting, task_of
    from distcomp.methods.weight_gather import parse_weight_gather
    from distcomp.network import parse_time

    if arguments.steps < 1 or arguments.eval_every < 1:
        raise DistcompError("--steps and --eval-every are 1 or more")
    import_plugins(arguments, arguments.script)
    method = _method(arguments.method)
    fabric = fabric_of(arguments, "workers")
    scenario = (
        Scenario(parse_time(arguments.compute))
        if arguments.scenario is None
        else Scenario.from_toml(arguments.scenario)
    )
    training_task = task_of(existing(arguments.script), arguments.arguments)
    if arguments.weights and not arguments.sharded:
        raise DistcompError("--weights says how shards are gathered; give --sharded as well")
    weights = parse_weight_gather(arguments.weights) if arguments.weights else None
    setting = Setting(fabric, scenario, seed=arguments.seed, sharded=arguments.sharded, weights=weights)
    simulation = _simulation(training_task, method, setting)
    recorder = _recorder(arguments, fabric.ranks)
    about = f"{fabric.ranks} workers of {simulation.layout.numel:,} parameters, {arguments.method}: simulated"
    print(about, file=sys.stderr if arguments.json else sys.stdout)
    begin_s = time.perf_counter()
    for found in _evaluations(simulation, arguments.steps, arguments.eval_every):
        step = simulation.steps
        if recorder is not None:
            recorder.metric(step=step, train_s=found["seconds"], **found)
        real_s = time.perf_counter() - begin_s
        told = "".join(f"  {name} {value:.4g}" for name, value in found.items())
        text = f"step {step:5}{told}  ({real_s:.0f} s of real time)"
        plain = {name: value if math.isfinite(value) else str(value) for name, value in found.items()}
        print(json.dumps({"step": step, **plain}) if arguments.json else text, flush=True)
    if recorder is not None:
        recorder.close()
    return 0


def _simulation(task: TrainingTask, method: Any, setting: Setting) -> Simulation | RoundsSimulation:
    """Step by step; round by round where a method goes on without who is late or dies."""
    from distcomp.advice import RoundsSimulation, Simulation
    from distcomp.averaging.periodic import Periodic

    if not isinstance(method, Periodic) or method.lateness is None:
        return Simulation(task, method, setting)
    if setting.sharded:
        raise DistcompError("outer rounds are held by whole models; leave --sharded out, or on_failure")
    return RoundsSimulation(task, method, setting.fabric, setting.scenario, setting.seed)


def _evaluations(
    simulation: Simulation | RoundsSimulation, steps: int, every: int
) -> Iterator[dict[str, float]]:
    """Train for so many steps; what is found each time that so many are done. Rounds are held whole."""
    from distcomp.advice import Simulation

    while (before := simulation.steps) < steps:
        if isinstance(simulation, Simulation):
            simulation.step()
        else:
            simulation.round()
        if simulation.steps // every > before // every or simulation.steps >= steps:
            met = {} if isinstance(simulation, Simulation) else simulation.told()
            yield {**simulation.evaluate(), **met}


def _method(text: str) -> Any:
    """The method to simulate. Raises DistcompError for PyTorch's own, which are held by their processes."""
    from distcomp.methods import parse

    if text == "ddp" or text.startswith("torch:"):
        raise DistcompError(
            f"{text} is PyTorch's own and runs in real processes only; simulate identity, which sends the "
            "same float32 values as ddp, or bf16"
        )
    catalogue.check(text)
    return parse(text)


def _recorder(arguments: argparse.Namespace, workers: int) -> recording.Recorder | None:
    if arguments.output is None:
        return None
    directory = new_directory(arguments.output)
    about = {
        "method": arguments.method,
        "ranks": workers,
        "simulated": True,
        "argv": [str(arguments.script), *arguments.arguments],
        **recording.surroundings(arguments.script.resolve().parent),
    }
    try:
        recording.write_about(directory, about)
        return recording.Recorder(directory, 0)
    except OSError as error:
        raise DistcompError(f"{directory} cannot be written ({error}); name another with -o") from None
