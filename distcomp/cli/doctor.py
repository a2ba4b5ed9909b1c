"""``distcomp doctor``: what this machine has and allows, and the remedy for each lack."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TESTED_TORCH = "2.13.0"
EXTRAS = {"rich": "report", "pyroute2": "emulate", "mpi4py": "mpi", "sklearn": "examples"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A ``lack`` costs something; with a ``fault`` nothing can train."""

    check: str
    status: str
    found: str
    remedy: str = ""


def add(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine has and lacks",
        description="Look at torch, backends, compiler, kernels and network emulation, and name each remedy.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print all findings; 1 if there is a fault."""
    findings = list(examine())
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        width = min(shutil.get_terminal_size().columns, 100)
        for finding in findings:
            print(_told(finding, width))
    return 1 if any(finding.status == "fault" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Look at everything."""
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield _torch()
    yield from _backends()
    yield _gpu()
    yield _compiler()
    yield _kernels()
    yield from _emulation()
    yield from _extras()


def _torch() -> Finding:
    import torch

    version = torch.__version__.partition("+")[0]
    tested = f"distcomp is tested with {TESTED_TORCH}"
    remedy = (
        ""
        if version == TESTED_TORCH
        else f"nothing, while it works; otherwise: pip install torch=={TESTED_TORCH}"
    )
    return Finding("torch", "ok" if not remedy else "lack", f"{torch.__version__}; {tested}", remedy)


def _backends() -> Iterator[Finding]:
    from distcomp.transports.backends import available

    there = available()
    names = ", ".join(name for name, has in there.items() if has) or "none"
    if any(there.values()):
        yield Finding("backends", "ok", names)
    else:
        yield Finding("backends", "fault", names, "install a torch that was built with torch.distributed")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return Finding("gpu", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Finding("gpu", "ok", "none that torch sees: training runs on the processor, over gloo")


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found:
        return Finding("compiler", "ok", found)
    remedy = "needed only to build the fast kernels: install gcc or clang, then reinstall distcomp"
    return Finding("compiler", "lack", "none of cc, gcc, clang", remedy)


def _kernels() -> Finding:
    from distcomp import kernels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = kernels.backend("cpu")
    if not caught:
        return Finding("kernels", "ok", f"processor: {backend}")
    return Finding("kernels", "lack", f"processor: {backend}, many times slower", str(caught[0].message))


def _emulation() -> Iterator[Finding]:
    if importlib.util.find_spec("pyroute2") is None:
        yield Finding("emulation", "lack", "pyroute2 is not installed", "pip install 'distcomp[emulate]'")
        return
    from distcomp.network import support

    allowed = support()
    if allowed.refusal is not None:
        yield Finding(
            "emulation", "lack", "no real packets: distcomp's transport throttles itself", allowed.refusal
        )
        return
    how = "in a user namespace, without root" if allowed.rootless else "as root"
    yield Finding("emulation", "ok", f"real packets: network namespaces and tc tbf, {how}")
    if allowed.netem:
        yield Finding("delay", "ok", "netem, in the kernel")
    else:
        remedy = "nothing is needed: --delay is then added in the transport; for netem: modprobe sch_netem"
        yield Finding("delay", "lack", "this kernel has no netem", remedy)


def _extras() -> Iterator[Finding]:
    for module, extra in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(module, "lack", "not installed", f"pip install 'distcomp[{extra}]'")
        else:
            yield Finding(module, "ok", "installed")


def _told(finding: Finding, width: int) -> str:
    head = f"{finding.status:<6}{finding.check:<11}"
    lines = textwrap.wrap(finding.found, width - len(head)) or [""]
    lines += textwrap.wrap(f"remedy: {finding.remedy}", width - len(head)) if finding.remedy else []
    return "\n".join((head if at == 0 else " " * len(head)) + line for at, line in enumerate(lines))
