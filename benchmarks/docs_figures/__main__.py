"""Writes every measured table and plot into README and docs, from committed result files and nothing else.

    python -m benchmarks.docs_figures            # all pages
    python -m benchmarks.docs_figures averaging  # docs/averaging.md

A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``. Run on committed results, it
changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks._common import arguments_of
from benchmarks._places import ROOT
from benchmarks._tables import Block, write_blocks
from benchmarks.docs_figures import (
    advice,
    averaging,
    claims,
    comparisons,
    conditional,
    distill,
    faults,
    first_success,
    formats,
    fsdp,
    measured,
    pareto,
    precision,
    pruning,
    rebuild,
    structured,
    updates,
    versions,
)

DOCS = ROOT / "docs"

PAGES: dict[str, list[tuple[Path, dict[str, Block]]]] = {
    "measured": [(ROOT / "README.md", measured.README), (DOCS / "measured.md", measured.BLOCKS)],
    "advice": [(DOCS / "advice.md", advice.BLOCKS)],
    "averaging": [(DOCS / "averaging.md", averaging.BLOCKS | claims.CLAIMS)],
    "pareto": [(DOCS / "pareto.md", pareto.BLOCKS | claims.GAPS)],
    "distill": [(DOCS / "distill.md", distill.BLOCKS)],
    "faults": [(DOCS / "faults.md", faults.BLOCKS)],
    "fsdp": [(DOCS / "fsdp.md", fsdp.BLOCKS)],
    "precision": [(DOCS / "precision.md", precision.BLOCKS)],
    "pruning": [(DOCS / "pruning.md", pruning.BLOCKS)],
    "conditional": [(DOCS / "conditional.md", conditional.BLOCKS)],
    "structured": [(DOCS / "structured.md", structured.BLOCKS), (DOCS / "blocks.md", structured.OF_BLOCKS)],
    "collectives": [(DOCS / "collectives.md", updates.COLLECTIVES)],
    "updates": [(DOCS / "updates.md", updates.BLOCKS)],
    "first_success": [(DOCS / "decisions" / "first-success.md", first_success.BLOCKS)],
    "rebuild": [(DOCS / "decisions" / "corrected-numbers.md", rebuild.BLOCKS)],
    "comparisons": [
        (DOCS / "compressors.md", comparisons.BLOCKS | formats.BLOCKS),
        (DOCS / "peers.md", {"peers": comparisons.BLOCKS["peers"]}),
        (DOCS / "how" / "choose.md", versions.CHOOSE),
    ],
    "versions": [(DOCS / "versions.md", versions.MATRIX), (DOCS / "watching.md", versions.TRACKERS)],
}

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "distcomp", "font.size": 9})


def save(figure: Figure, name: str) -> None:
    """As an SVG that is the same whenever it is drawn."""
    figure.tight_layout(h_pad=1.5)
    figure.savefig(
        DOCS / "figures" / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight"
    )
    plt.close(figure)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("pages", nargs="*", choices=[[], *PAGES], help="these alone")
    wanted = parser.parse_args().pages or list(PAGES)
    for name in wanted:
        for page, blocks in PAGES[name]:
            write_blocks(page, blocks)
    drawn = {"averaging": averaging.FIGURES, "pareto": pareto.FIGURES | claims.FIGURES}
    for page, figures in drawn.items():
        if page in wanted:
            for name, draw in figures.items():
                save(draw(), name)


if __name__ == "__main__":
    main()
