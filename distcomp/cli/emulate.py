"""``distcomp emulate``: a script, once per method, on a network made here; then the table and the page."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcomp import recording
from distcomp.cli import methods as catalogue
from distcomp.cli import prefork_client, report
from distcomp.cli.progress import progress
from distcomp.cli.run import existing, new_directory
from distcomp.errors import DistcompError

if TYPE_CHECKING:
    from distcomp.network import Fabric, LaunchResult, Net

METHODS = "ddp; torch:fp16; bf16; qsgd:bits=8; qsgd:bits=4; qsgd:bits=1; none"
TAIL_LINES = 20

DESCRIPTION = """\
Run SCRIPT once per method, every rank on a host of its own, on a network that
is made on this machine: real packets, held to a rate by the kernel, where the
machine allows it. Then compare: a table, and DIR/report.html.

The script calls distcomp.attach(model, optimizer) and logs what it learns with
handle.log(step=..., train_s=..., test_loss=..., test_accuracy=...).
"""
EPILOG = f"""\
examples:
  distcomp emulate --ranks 4 --rate 100mbit examples/digits.py
  distcomp emulate --rate 1gbit --delay 20ms --method ddp --method bf16 train.py
  distcomp emulate --fabric two-racks.toml --methods "ddp; qsgd:bits=4" train.py

methods if none are named:
  {METHODS}
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "emulate", help="compare methods on an emulated network", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=plain,
    )  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument("--ranks", type=int, metavar="N", help="how many hosts (default 4)")
    network.add_argument("--rate", metavar="RATE", help="of each host's link, such as 100mbit (the default)")
    network.add_argument("--delay", metavar="TIME", help="one way, such as 20ms (default none)")
    network.add_argument(
        "--fabric", type=Path, metavar="FILE", help="a TOML file with ranks, rates and racks"
    )
    network.add_argument(
        "--no-packets", action="store_true", help="let distcomp's transport throttle itself, as without root"
    )
    parser.add_argument("--methods", metavar="LIST", help="what to compare, separated by semicolons")
    parser.add_argument("--method", action="append", metavar="M", help="one of them; may be repeated")
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="test loss to reach (default: DDP's + 5 %%)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where records and page go")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what rank 0 prints, not bars")
    parser.add_argument("--cold", action="store_true", help="start a fresh Python for each rank and method")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Experiment:
    """What is to be run, and where its records go."""

    script: Path
    arguments: tuple[str, ...]
    methods: tuple[str, ...]
    directory: Path

    def record_of(self, method: str) -> Path:
        """The run directory of a method; their names sort in the order of the methods."""
        name = re.sub(r"[^A-Za-z0-9.=]+", "-", method)
        return self.directory / f"{self.methods.index(method) + 1:02}-{name}"


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 if a method failed."""
    from distcomp.network import emulate

    fabric = _fabric(arguments)
    chosen = _methods(arguments)
    script = existing(arguments.script)
    directory = new_directory(arguments.output or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    experiment = Experiment(script, tuple(arguments.arguments), chosen, directory)
    with emulate(fabric, packets=False if arguments.no_packets else None) as net:
        print("\n".join(net.describe()), flush=True)
        start = _cold(experiment) if arguments.cold else _warm(experiment, net)
        with start as command, progress(chosen, bars=not arguments.verbose) as shown:
            failed = [
                one for one in chosen if not _one(experiment, one, net, command, shown, arguments.verbose)
            ]
    if len(failed) == len(chosen):
        return 1
    comparison = report.compare_directories([experiment.directory], arguments.target)
    report.write_page(comparison, directory / "report.html")
    print()
    report.show(comparison)
    print(f"\nwrote {directory / 'report.html'}")
    return 1 if failed else 0


def _one(
    experiment: Experiment, method: str, net: Net, command: Sequence[str], shown: Any, verbose: bool
) -> bool:
    """Run one method on all ranks; tell of a failure, keep the record."""
    from distcomp.network.launch import show_nothing, show_rank_0

    directory = experiment.record_of(method)
    directory.mkdir()
    about = {
        "method": method,
        "ranks": net.fabric.ranks,
        "argv": [str(experiment.script), *experiment.arguments],
        "network": network(net),
        **recording.surroundings(experiment.script.resolve().parent),
    }
    recording.write_about(directory, about)
    environment = {recording.METHOD: method, recording.RUN_DIR: str(directory.resolve())}
    with shown.method(method, directory):
        job = net.start([*command, str(experiment.script), *experiment.arguments], environment)
        result = job.wait(show=show_rank_0 if verbose else show_nothing)
    status = 0 if result.ok else _first_status(result)
    recording.write_about(directory, about | {"exit_status": status, "seconds": result.seconds})
    for rank, output in result.outputs.items():
        (directory / f"output{rank}.txt").write_text(output, encoding="utf-8")
    if status:
        _tell_failure(method, result, directory)
    elif not (directory / "rank0.jsonl").exists():
        raise DistcompError(
            f"{experiment.script} recorded nothing; let it call distcomp.attach(model, optimizer)"
        )
    return status == 0


def network(net: Net) -> dict[str, Any]:
    """The network as it was asked for and as it was measured, for the record."""
    told, *details = net.describe()
    asked, _, packets = told.partition(": ")
    return {
        "asked": asked,
        "fabric": net.fabric.to_toml(),
        "real": net.real_packets,
        "packets": "; ".join([packets, *(line for line in details if not line.startswith("self-test"))]),
        "achieved": "; ".join(
            line.removeprefix("self-test: ") for line in details if line.startswith("self-test")
        ),
        "links": [dataclasses.asdict(link) for link in net.links],
    }


def _first_status(result: LaunchResult) -> int:
    return next(code for code in result.exit_codes.values() if code)


def _tell_failure(method: str, result: LaunchResult, directory: Path) -> None:
    """Who failed first, and what it said last."""
    rank = result.first_failure if result.first_failure is not None else 0
    print(f"{method} failed: rank {rank} ended with status {result.exit_codes[rank]}", file=sys.stderr)
    for line in result.outputs[rank].splitlines()[-TAIL_LINES:]:
        print(f"    {line}", file=sys.stderr)
    print(f"    (all that the ranks said is in {directory}/output*.txt)", file=sys.stderr)


def _cold(experiment: Experiment) -> AbstractContextManager[list[str]]:
    return nullcontext([sys.executable])


@contextmanager
def _warm(experiment: Experiment, net: Net) -> Iterator[list[str]]:
    """Start a warm process on every host; yields the command that runs a script in them."""
    with tempfile.TemporaryDirectory(prefix="distcomp-") as sockets:
        warm = [sys.executable, "-P", "-m", "distcomp.cli.prefork", sockets, str(experiment.script.resolve())]
        with closing(net.start(warm)):
            yield [sys.executable, "-I", "-S", prefork_client.__file__, sockets]


def _methods(arguments: argparse.Namespace) -> tuple[str, ...]:
    """In the order given, each once, all of them known."""
    listed = arguments.methods.split(";") if arguments.methods is not None else []
    named = [one.strip() for one in [*listed, *(arguments.method or [])] if one.strip()]
    chosen = tuple(dict.fromkeys(named or [one.strip() for one in METHODS.split(";")]))
    for method in chosen:
        catalogue.check(method)
    return chosen


def _fabric(arguments: argparse.Namespace) -> Fabric:
    from distcomp.network import Fabric

    if arguments.fabric is None:
        return Fabric.uniform(
            4 if arguments.ranks is None else arguments.ranks,
            arguments.rate or "100mbit",
            arguments.delay or 0.0,
        )
    if arguments.ranks is not None or arguments.rate is not None or arguments.delay is not None:
        raise DistcompError("--fabric describes the whole network; leave out --ranks, --rate and --delay")
    return Fabric.from_toml(arguments.fabric)
