"""``distcomp advise``: which method, on which network, for which model? It may say none."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcomp.cli import methods as catalogue
from distcomp.cli.fabrics import add_fabric, fabric_of
from distcomp.cli.plugins import add_import, import_plugins
from distcomp.cli.run import existing
from distcomp.cli.tables import fitted, sentence
from distcomp.errors import DistcompError, require

if TYPE_CHECKING:
    from distcomp.advice.advise import Advice, AdviceRow
    from distcomp.advice.mixtures import MixtureAdvice

DESCRIPTION = """\
Time a few real steps of SCRIPT on this machine, and what each method does with
its gradients; predict step times on the network that the options describe;
recommend a method, or plain DDP, and how large DDP's buckets should be. SCRIPT
is any training loop with a DistributedDataParallel or FSDP2 model, which is run
as the only rank and stopped after some steps, or defines training_task() as
examples/digits.py does.

A sharded model is compared with plain FSDP2 (fsdp2), and methods may say how
weights are gathered: --methods "qsgd:bits=4 weights=qsgd:bits=8; identity".
"""
SHOWN_SCALES = (2, 16, 128, 1024, 4096)


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "advise", help="say whether to compress, and how", description=DESCRIPTION, formatter_class=plain
    )
    add_fabric(parser, "--ranks")
    parser.add_argument(
        "--ranks-here", type=int, default=1, metavar="N",
        help="ranks that share a machine like this one (default 1), as under distcomp emulate",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=int, metavar="N",
        help="ranks that hold a sharded model together (default all); the others hold replicas of it",
    )  # fmt: skip
    parser.add_argument("--methods", metavar="LIST", help="what to compare, separated by semicolons")
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--memory", metavar="SIZE", help="of each rank, such as 16GB: what does not fit is refused"
    )
    parser.add_argument(
        "--mixture", metavar="TEXT", action="append", default=[],
        help="a mixture of experts that is no MixtureOfExperts of distcomp's (which are found): "
        "parameters=*.experts.*,tokens=256,width=128,hidden=256,experts=8,k=2",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="step time against bandwidth (.svg, .png)")
    parser.add_argument("--model", type=Path, required=True, metavar="SCRIPT", help="what is trained")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the script is given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, predict, recommend."""
    from distcomp.advice.advise import advise
    from distcomp.advice.memory import parse_size
    from distcomp.advice.mixtures import Mixture, advise_experts, mixtures_seen
    from distcomp.advice.script import defines, observe_script
    from distcomp.advice.task import NAME, task_of
    from distcomp.network.model import ALONE, Host

    import_plugins(arguments, arguments.model)
    methods = [one.strip() for one in (arguments.methods or "").split(";") if one.strip()]
    for method in methods:
        _check(method)
    if arguments.ranks_here < 1:
        raise DistcompError("--ranks-here is 1 or more")
    fabric = fabric_of(arguments, "ranks")
    memory_bytes = parse_size(arguments.memory) if arguments.memory is not None else None
    script, given = existing(arguments.model), [one for one in arguments.arguments if one != "--"]
    has_task = defines(script, NAME)
    _tell(f"reading {script}" if has_task else f"running some steps of {script}")
    named = [Mixture.parse(text) for text in arguments.mixture]
    with mixtures_seen() as seen:
        trained = task_of(script, given) if has_task else observe_script(script, given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    host = Host(arguments.ranks_here, cores) if arguments.ranks_here > 1 else ALONE
    advice = advise(trained, fabric, methods, host, _tell, arguments.shards, memory_bytes)
    compared = ("ddp", advice.rows[0].method) if advice.baseline == "ddp" else ()
    experts = advise_experts(trained, fabric, named or seen, list(dict.fromkeys(compared)), host)
    _done()
    if arguments.plot is not None:
        plot(advice, arguments.plot)
    if arguments.json:
        told = {**advice.as_json(), **({"experts": experts.as_json()} if experts is not None else {})}
        print(json.dumps(told, indent=2))
        return 0
    show(advice)
    if experts is not None:
        show_experts(experts)
    return 0


def _check(method: str) -> None:
    """Raises DistcompError for what there is none of, or what is not predicted."""
    from distcomp.advice.predict import PREDICTED_HOOKS
    from distcomp.advice.sharded import PLAIN, ShardedSetting

    if method == PLAIN or " weights=" in method:
        ShardedSetting.of(method)
        return
    catalogue.check(method)
    if method.startswith("torch:") and method not in PREDICTED_HOOKS:
        raise DistcompError(f"{method} is not predicted; of PyTorch's own, {', '.join(PREDICTED_HOOKS)} are")


def show(advice: Advice) -> None:
    """Print what was measured, the table, and the sentence."""
    from distcomp.advice.words import milliseconds

    print(f"{advice.parameters:,} parameters, a step computes {milliseconds(advice.compute_s)} here;")
    print(f"predicted for {advice.fabric.ranks} ranks, fastest first;")
    print("efficiency (computing's share of a step) by number of ranks;")
    print(f"two measurements on this machine differ by {advice.noise:.0%}\n")
    shown = [n for n in SHOWN_SCALES if n in advice.rows[0].efficiency]
    head = ["method", "step", "sent", "speed-up", "faster below", *(f"{n} ranks" for n in shown)]
    print(fitted(head, [_cells(row, shown, row.method == advice.baseline) for row in advice.rows]))
    for refused in advice.refused:
        print(f"\n{sentence(refused.sentence)}")
    print(f"\n{sentence(advice.sentence)}")
    if advice.buckets is not None:
        print(f"\n{sentence(advice.buckets.sentence)}")


def show_experts(advice: MixtureAdvice) -> None:
    """Print the ways to hold experts, and the sentence."""
    from distcomp.advice.words import milliseconds

    print(f"\n{len(advice.mixtures)} mixture{'s' if len(advice.mixtures) > 1 else ''} of experts:\n")
    cells = [
        [row.held, row.method, row.rows or "-", milliseconds(row.step_s), f"{row.sent_bytes / 1e3:,.0f} kB"]
        for row in advice.rows
    ]
    print(fitted(["experts", "gradients by", "rows by", "step", "sent"], cells))
    print(f"\n{sentence(advice.sentence)}")


def _tell(what: str) -> None:
    """On a terminal the last line only, elsewhere a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what} ...", end="", file=sys.stderr, flush=True)
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)


def _done() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _cells(row: AdviceRow, shown: list[int], is_baseline: bool) -> list[str]:
    from distcomp.advice.words import WORTH, milliseconds

    even = "-" if is_baseline else _rate(row.break_even_bps)
    if not is_baseline and math.isinf(row.break_even_bps) and row.speed_up < WORTH:
        even = f"not by {WORTH - 1:.0%}"
    sent = f"{row.prediction.sent_bytes / 1e3:,.0f} kB"
    step = milliseconds(row.prediction.step_s)
    return [
        row.method,
        step,
        sent,
        f"{row.speed_up:.2f}x",
        even,
        *(f"{row.efficiency[n]:.0%}" for n in shown),
    ]


def _rate(bps: float) -> str:
    from distcomp.network import format_rate

    if bps == 0:
        return "never"
    return "any rate" if math.isinf(bps) else format_rate(float(f"{bps:.2g}"))


def plot(advice: Advice, path: Path) -> None:
    """Step time against the rate of every link, all methods."""
    require("matplotlib", extra="report").use("Agg")
    pyplot = require("matplotlib.pyplot", extra="report")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for method, points in advice.curves.items():
        axes.loglog(*zip(*points, strict=True), label=method, linewidth=2 if method == advice.baseline else 1)
    finite = [rate for rate in advice.fabric.rates_bps if math.isfinite(rate)]
    if finite:
        axes.axvline(max(finite), color="grey", linewidth=0.5)
    axes.set_xlabel("rate of each link (bit/s)")
    axes.set_ylabel("predicted step time (s)")
    axes.legend()
    try:
        figure.savefig(path, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise DistcompError(f"{path} cannot be written ({error}); name a .svg or .png file") from None
    finally:
        pyplot.close(figure)
