"""Two checkouts side by side: is the newer one as fast? In turns, so that both meet one machine.

    python -m benchmarks.before_after ../old            # writes results/rebuild_speed.json
    python -m benchmarks.before_after ../old --name before_after --only exchange  # another file
    python -m benchmarks.before_after ../old --name exchange_cores --only core, --pairs 5 \\
        --methods qsgd:bits=8 qsgd:bits=4 qsgd:bits=1 powersgd:rank=4 topk:ratio=0.01 \\
        pqasgd:period=1,bits=4 choco

Exchanges: 17 MB of gradients among 4 ranks on an emulated network of 100 Mbit/s; some steps of the old
checkout, then some of the new, and so on; a time is the slowest rank's. Cores: the same at 1 Gbit/s, and a
time is what a rank's threads spend on a core for an exchange, over a step that sends nothing. Attaching: a
training step of two ranks on an unshaped network, with ``identity`` attached, over the same step bare.
Importing: a new process that asks for ``distcomp.attach``, with bytecode cached, as every import but a
machine's first finds it.
Each row holds the median of each checkout and the median of the ratios, pair by pair; an exchange's also what
a rank sent, for where a method's numbers were corrected meanwhile it sends more or less, and the ratio of the
times per byte; qsgd's mean is rounded to more bits than it was, and a row has it as it was. Every process
imports distcomp from the checkout that it measures: ``src/`` where there is one, else its root.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._common import SETTINGS, arguments_of, call, median, write
from benchmarks._places import RESULTS, ROOT
from distcomp.network import Fabric, emulate
from distcomp.network.launch import show_nothing
from distcomp.recording import surroundings

RANK = ROOT / "benchmarks" / "_before_after_rank.py"
METHODS = (
    "qsgd:bits=4",
    "qsgd:bits=4, its mean in 4 bits",
    "qsgd:bits=1",
    "powersgd:rank=4",
    "topk:ratio=0.01",
)
Measure = Callable[[Path], dict[str, float]]
"""Of a checkout: ``seconds``, or a ratio of them, and with an exchange ``payload_bytes``."""


def source_of(checkout: Path) -> Path:
    """The folder that PYTHONPATH must name for distcomp to be that checkout's."""
    folder = checkout / "src" if (checkout / "src" / "distcomp").is_dir() else checkout
    if not (folder / "distcomp" / "__init__.py").is_file():
        raise SystemExit(f"{checkout} holds no src/distcomp/ and no distcomp/; name a checkout")
    return folder


def on_ranks(net: Any, what: str, method: str, steps: int, checkout: Path) -> dict[str, float]:
    """What the ranks measured with the distcomp of ``checkout``: of seconds the median."""
    source = str(source_of(checkout))
    settings = {"what": what, "method": method, "steps": steps, "source": source}
    result = net.launch(
        [sys.executable, str(RANK)],
        env={SETTINGS: json.dumps(settings), "PYTHONPATH": source},
        timeout_s=600,
        show=show_nothing,
    )
    if not result.ok:
        failed = result.first_failure or 0
        raise SystemExit(f"{what} of {checkout} failed on rank {failed}: {result.outputs[failed][-3000:]}")
    lines = [line for line in result.outputs[0].splitlines() if line.startswith("{")]
    measured = json.loads(lines[-1])
    return {**measured, "seconds": median(measured["seconds"])}


def import_s(bytecode: str, checkout: Path) -> dict[str, float]:
    """A process that imports distcomp and asks for its first public name; its bytecode is in a folder."""
    environ = {**os.environ, "PYTHONPATH": str(source_of(checkout)), "PYTHONPYCACHEPREFIX": bytecode}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    code = "import distcomp; distcomp.attach; print(distcomp.__file__)"
    began_s = time.perf_counter()
    file = call([sys.executable, "-c", code], env=environ, cwd="/").strip()
    took_s = time.perf_counter() - began_s
    check_source(file, checkout)
    return {"seconds": took_s}


def check_source(file: str, checkout: Path) -> None:
    """Raise SystemExit where another distcomp than the checkout's was measured."""
    if not Path(file).is_relative_to(source_of(checkout)):
        raise SystemExit(f"measured {file}, which is not in {source_of(checkout)}; check PYTHONPATH")


def paired(measure: Measure, old: Path, new: Path, pairs: int) -> dict[str, Any]:
    """``measure`` of each checkout in turn; who begins changes from pair to pair."""
    times: dict[Path, list[float]] = {old: [], new: []}
    sent_bytes: dict[Path, float] = {}
    for number in range(pairs):
        for checkout in (old, new) if number % 2 == 0 else (new, old):
            measured = measure(checkout)
            times[checkout].append(measured["seconds"])
            sent_bytes[checkout] = measured.get("payload_bytes", 0)
    both = list(zip(times[old], times[new], strict=True))
    row: dict[str, Any] = {
        "commit": surroundings(ROOT)["commit"],
        "before": median(times[old]),
        "after": median(times[new]),
        "ratio": median([after / before for before, after in both]),
        "pairs": [list(pair) for pair in both],
    }
    if sent_bytes[old]:
        row["payload_bytes"] = [sent_bytes[old], sent_bytes[new]]
        row["ratio_per_byte"] = row["ratio"] * sent_bytes[old] / sent_bytes[new]
    return row


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("old", type=Path, help="the older checkout, with its kernels built")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6, help="steps of a process")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--only", help="the rows whose names hold this; the file keeps its others")
    parser.add_argument("--name", default="rebuild_speed", help="of the result file")
    parser.add_argument("--dry", action="store_true", help="print the rows and write nothing")
    asked = parser.parse_args()
    old = asked.old.resolve()
    result: dict[str, Any] = {"what": (__doc__ or "").splitlines()[0], "rows": {}}
    older = surroundings(old)["commit"]
    file = RESULTS / f"{asked.name}.json"
    if asked.only and file.exists():
        begun = json.loads(file.read_text())
        result |= {name: begun[name] for name in ("rows", "network")}

    def add(name: str, measure: Measure) -> None:
        """Measure one row and write what there is: a run that is stopped loses one row, not all."""
        if asked.only and asked.only not in name:
            return
        row = result["rows"][name] = {"before_commit": older, **paired(measure, old, ROOT, asked.pairs)}
        print(f"{name:<36}{row['before']:9.4f}{row['after']:9.4f}  ratio {row['ratio']:.3f}", flush=True)
        if not asked.dry:
            write(asked.name, result)

    with tempfile.TemporaryDirectory() as bytecode:
        for checkout in (old, ROOT):
            import_s(bytecode, checkout)  # the first writes the bytecode
        add("import", partial(import_s, bytecode))
    with emulate(Fabric.uniform(2, "unshaped")) as net:
        overhead = partial(on_ranks, net, "overhead", "identity", 4 * asked.steps)
        add("step with identity / bare step", overhead)
    with emulate(Fabric.uniform(4, "100mbit")) as net:
        result["network"] = net.describe()
        for method in asked.methods:
            add(f"exchange, {method}", partial(on_ranks, net, "exchange", method, asked.steps))
    with emulate(Fabric.uniform(4, "1gbit")) as net:
        result["network"] += net.describe()
        for method in asked.methods:
            add(f"core, {method}", partial(on_ranks, net, "core", method, 2 * asked.steps))


if __name__ == "__main__":
    main()
