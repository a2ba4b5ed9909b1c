"""What the GPU path does on a GPU: bits, bytes a second, and training over NCCL.

    benchmarks/gpu.sh                               # every part, under ten minutes; writes results/gpu.json
    benchmarks/gpu.sh --rehearse                    # the same on a CPU, small; writes no result
    python -m benchmarks.gpu kernels                # one part

Parts: ``kernels``, every Triton kernel against the reference, bit by bit, and every codec against the CPU's;
``bandwidth``, what codecs read and write by the second beside a copy, their tensors in no cache; ``ddp`` and
``fsdp2``, one rank for each GPU over NCCL, losses against the same ranks on the CPU over Gloo, weights equal
on all ranks; ``graphs``, forward and backward replayed from CUDA graphs with the exchange outside, and
whether one can be captured whole; ``streams``, the same bits beside other work, and how often a step makes
the host wait. Each part keeps its own commit and date in the result; one that failed, or did not end, says
so there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _gpu_kernels as on_kernels
from benchmarks import _gpu_parts as on_ranks
from benchmarks._common import arguments_of, write
from benchmarks._gpu_place import Place, interpreted
from benchmarks._places import RESULTS, ROOT
from distcomp.recording import surroundings

PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "kernels": on_kernels.kernels_part,
    "bandwidth": on_kernels.bandwidth_part,
    "ddp": on_ranks.ddp_part,
    "fsdp2": on_ranks.fsdp2_part,
    "graphs": on_ranks.graphs_part,
    "streams": on_ranks.streams_part,
}
ABOUT = "about"


def keep(part: str, found: dict[str, Any], place: Place, folder: Path) -> Path:
    """Write a part's result beside those of the others."""
    path = folder / "gpu.json"
    others = json.loads(path.read_text())["parts"] if path.exists() else {}
    about = surroundings(ROOT)
    mine = {"commit": about["commit"], "started": about["started"], **place.about(), **found}
    return write("gpu", {"parts": {**others, part: mine}}, place.seed, folder)


def outcome(part: str, place: Place) -> dict[str, Any]:
    """What the part found; what it raised, if it did."""
    try:
        return PARTS[part](place)
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "failed": f"{type(error).__name__}: {error}"}


def arguments() -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument("part", choices=[ABOUT, *PARTS], help=f"{ABOUT}: only say where this is")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small; nothing counts as measured")
    parser.add_argument("--to", type=Path, help="folder of the result (a rehearsal's: a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if not asked.rehearse and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no GPU here: install a build with CUDA where there is one, or "
            "rehearse on this CPU with --rehearse"
        )
    if asked.rehearse:
        interpreted()
    place = Place(asked.rehearse, asked.seed)
    if asked.part == ABOUT:
        print(", ".join(f"{name} {value}" for name, value in place.about().items()))
        return
    with tempfile.TemporaryDirectory() as passing:
        folder = asked.to or (Path(passing) if asked.rehearse else RESULTS)
        keep(asked.part, {"ok": False, "failed": "it did not end"}, place, folder)
        found = outcome(asked.part, place)
        written = keep(asked.part, found, place, folder)
        print(json.dumps(found, indent=1))
        print(f"{'rehearsed, kept in' if asked.rehearse else 'written to'} {written}", file=sys.stderr)
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
