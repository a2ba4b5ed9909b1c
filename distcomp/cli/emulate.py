"""``distcomp emulate``: a script, once per method, on a network made here; then the table and the page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcomp import recording
from distcomp.cli import methods as catalogue
from distcomp.cli import prefork_client, report
from distcomp.cli.plugins import add_import, import_plugins
from distcomp.cli.progress import progress
from distcomp.cli.run import add_detail, dated_directory, detail, existing, new_directory
from distcomp.errors import DistcompError
from distcomp.report import as_json

if TYPE_CHECKING:
    from distcomp.network import Fabric, LaunchResult, Net

METHODS = "ddp; torch:fp16; bf16; qsgd:bits=8; qsgd:bits=4; qsgd:bits=1; none"
TAIL_LINES = 20
BASELINE = "ddp"
DETAIL = 50

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
    add_comparison(parser, repeats=1, again="1, and ddp once more at the end")
    parser.set_defaults(run=run)


def add_comparison(parser: argparse.ArgumentParser, repeats: int, again: str) -> None:
    """What is compared, how often, and where it goes: the same whatever the network is."""
    parser.add_argument("--methods", metavar="LIST", help="what to compare, separated by semicolons")
    parser.add_argument("--method", action="append", metavar="M", help="one of them; may be repeated")
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="test loss to reach (default: DDP's + 5 %%)"
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, metavar="N",
        help=f"runs of each method, in turn (default {again})",
    )  # fmt: skip
    add_detail(parser, DETAIL)
    add_import(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where records and page go")
    parser.add_argument(
        "--json", action="store_true", help="print figures as JSON; what is told meanwhile goes to stderr"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what rank 0 prints, not bars")
    parser.add_argument("--cold", action="store_true", help="start a fresh Python for each rank and method")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")


@dataclass(frozen=True)
class Experiment:
    """What is to be run, and where its records go."""

    script: Path
    arguments: tuple[str, ...]
    methods: tuple[str, ...]
    directory: Path
    repeats: int = 1
    detail: Mapping[str, str] = field(default_factory=dict)
    as_it_is: bool = False
    """On this machine, no network being made."""

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All methods one after the other, ``repeats`` times. Where that is once, the baseline runs again at
        the end: what its two runs differ by is chance."""
        order = self.methods * self.repeats
        if self.repeats == 1 and len(self.methods) > 1 and BASELINE in self.methods:
            order += (BASELINE,)
        runs = []
        for at, method in enumerate(order):
            again = order[:at].count(method)
            name = re.sub(r"[^A-Za-z0-9.=]+", "-", method)[:100]
            shown = f"{method} (again)" if again == 1 else f"{method} ({again + 1})" if again else method
            runs.append(PlannedRun(shown, method, self.directory / f"{at + 1:02}-{name}"))
        return tuple(runs)


@dataclass(frozen=True)
class PlannedRun:
    """One run: what it is called while it runs, its method, and where its record goes; the names of these
    directories sort as the runs do."""

    shown: str
    method: str
    directory: Path


def run(arguments: argparse.Namespace) -> int:
    """Compare; 1 if a method failed."""
    return run_comparison(arguments, _fabric(arguments), packets=False if arguments.no_packets else None)


def run_comparison(
    arguments: argparse.Namespace, fabric: Fabric, packets: bool | None = None, as_it_is: bool = False
) -> int:
    """Run each method on the fabric, then report; 1 if a method failed. ``as_it_is``: the ranks are those of
    this machine, and no network is made or recorded."""
    from distcomp.network import emulate

    import_plugins(arguments, arguments.script)
    chosen = _methods(arguments)
    script = existing(arguments.script)
    if arguments.repeats < 1:
        raise DistcompError(f"--repeats is {arguments.repeats}; give 1 or more")
    directory = new_directory(arguments.output) if arguments.output else dated_directory(Path("runs"))
    experiment = Experiment(
        script, tuple(arguments.arguments), chosen, directory, arguments.repeats, detail(arguments),
        as_it_is,
    )  # fmt: skip
    runs = experiment.runs
    told = redirect_stdout(sys.stderr if arguments.json else sys.stdout)
    with told, emulate(fabric, False if as_it_is else packets) as net:
        here = [f"{fabric.ranks} ranks on this machine, as it is"]
        print("\n".join(here if as_it_is else net.describe()), flush=True)
        start = _cold(experiment) if arguments.cold else _warm(experiment, net)
        with start as command, progress([planned.shown for planned in runs], not arguments.verbose) as shown:
            failed = [
                planned
                for planned in runs
                if not _one(experiment, planned, net, command, shown, arguments.verbose)
            ]
    if len(failed) == len(runs):
        return 1
    comparison = report.compare_directories([experiment.directory], arguments.target)
    page = directory / "report.html"
    report.write_page(comparison, page)
    if arguments.json:
        print(json.dumps(as_json(comparison), indent=2))
        return 1 if failed else 0
    print()
    report.show(comparison)
    print(f"\nwrote {page}")
    return 1 if failed else 0


def _one(
    experiment: Experiment, planned: PlannedRun, net: Net, command: Sequence[str], shown: Any, verbose: bool
) -> bool:
    """Run one method on all ranks; report a failure, keep the record."""
    from distcomp.network.launch import show_nothing, show_rank_0

    method, directory = planned.method, planned.directory
    directory.mkdir()
    about = {
        "asked": method,
        "ranks": net.fabric.ranks,
        "argv": [str(experiment.script), *experiment.arguments],
        "network": None if experiment.as_it_is else network(net),
        **recording.surroundings(experiment.script.resolve().parent),
    }
    recording.write_about(directory, about)
    environment = {recording.METHOD: method, recording.RUN_DIR: str(directory.resolve())}
    environment |= experiment.detail
    with shown.method(planned.shown, directory):
        argv = [*command, str(experiment.script), *experiment.arguments]
        job = net.start(argv, environment, _places(net.fabric.ranks) if experiment.as_it_is else None)
        result = job.wait(show=show_rank_0 if verbose else show_nothing)
    status = 0 if result.ok else _first_status(result)
    recording.write_about(directory, about | {"exit_status": status, "seconds": result.seconds})
    for rank, output in result.outputs.items():
        (directory / f"output{rank}.txt").write_text(output, encoding="utf-8")
    if status:
        _report_failure(method, result, directory)
    _check_attached(experiment, method, directory, failed=status != 0)
    return status == 0


def _places(ranks: int) -> list[dict[str, str]]:
    """Of ranks that share this machine: each takes a GPU of its own, where there are any."""
    return [{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)]


def _check_attached(experiment: Experiment, method: str, directory: Path, failed: bool) -> None:
    """Raise DistcompError unless the script attached what it was asked to, and will the next method, too."""
    about = recording.read_run(directory).about
    attached, script = about.get("method"), experiment.script
    if attached is None and not failed:
        raise DistcompError(
            f"{script} attached no method, so nothing was recorded; let it call "
            "distcomp.attach(model, optimizer)"
        )
    remedy = f"leave the method out in {script.name}: distcomp.attach(model, optimizer)"
    if attached not in (None, method):
        raise DistcompError(
            f"{script} attached {attached} and not {method}, which it was asked for; {remedy}"
        )
    if about.get("method_from") == "script" and len(experiment.methods) > 1:
        raise DistcompError(
            f"{script} names {attached} itself, so it would run for every other method, too; {remedy}"
        )


def network(net: Net) -> dict[str, Any]:
    """The network as it was asked for and as it was measured, for the record."""
    summary, *details = net.describe()
    asked, _, packets = summary.partition(": ")
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


def _report_failure(method: str, result: LaunchResult, directory: Path) -> None:
    """Which rank failed first, and what it printed last."""
    rank = result.first_failure if result.first_failure is not None else 0
    print(f"{method} failed: rank {rank} ended with status {result.exit_codes[rank]}", file=sys.stderr)
    for line in result.outputs[rank].splitlines()[-TAIL_LINES:]:
        print(f"    {line}", file=sys.stderr)
    print(f"    (all that the ranks printed is in {directory}/output*.txt)", file=sys.stderr)


def _cold(experiment: Experiment) -> AbstractContextManager[list[str]]:
    return nullcontext([sys.executable])


@contextmanager
def _warm(experiment: Experiment, net: Net) -> Iterator[list[str]]:
    """Start a warm process on every host; yields the command that runs a script in them."""
    sockets = net.folder()
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
