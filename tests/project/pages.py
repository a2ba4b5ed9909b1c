"""What README and the docs tell people to type: their Python blocks as programs, and their commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = ("methods", "reference", "troubleshooting", "tutorial")
"""What the building of the docs writes: pages of these names, and what is in folders of these names."""
WRITTEN = [page for page in PAGES if not {page.stem, page.parent.name} & set(MADE)]

FENCE = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRELUDE = """\
import torch, torch.distributed as dist, distcomp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
"""
WRAP = "model = DistributedDataParallel(model)\n"
STEP = (
    "\nmodel(torch.ones(1, 4)).sum().backward()\noptimizer.step()\nassert handle.stats()['iterations'] == 1\n"
)


def snippets() -> list[tuple[str, str]]:
    """(where, program) of each Python block, and of each diff as it reads once it has been applied."""
    found = []
    for page in WRITTEN:
        for number, (language, text) in enumerate(FENCE.findall(page.read_text()), start=1):
            if language == "diff":
                kept = (line for line in text.splitlines() if not line.startswith("-"))
                text = "\n".join(line[1:].removeprefix(" ") for line in kept)
            found.append((f"{page.relative_to(ROOT)}:{number}", text))
    return found


def program(snippet: str) -> str:
    """A whole script as it is; a fragment after what it takes for granted, with a step for its handle."""
    if "import distcomp" in snippet:
        return snippet
    if "import horovod" in snippet:
        return PRELUDE + snippet
    wrap = "" if WRAP.strip() in snippet else WRAP
    return PRELUDE + wrap + snippet + (STEP if "handle" in snippet else "")


CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GUIDES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "docker" / "README.md",
    *sorted((ROOT / "launchers").rglob("*.md")),
]


@dataclass(frozen=True)
class Command:
    """A line that a page tells people to type, and the page."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell splits it, without what it says of its output; comments are none."""
        return shlex.split(self.text.partition(" > ")[0], comments=True)

    @property
    def program(self) -> str:
        """What is started, behind the variables that are set for it."""
        return next(word for word in self.words if "=" not in word.partition("/")[0])


def commands() -> list[Command]:
    """Each line behind a ``$``, page by page, in the order in which they stand."""
    return [
        Command(str(page.relative_to(ROOT)), line.removeprefix("$ "))
        for page in [*WRITTEN, *GUIDES]
        for block in CONSOLE.findall(page.read_text().replace("\\\n", " "))
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def python_block(page: str, containing: str) -> str:
    """The one Python block of a page that holds a text."""
    blocks = [text for language, text in FENCE.findall((ROOT / page).read_text()) if language == "python"]
    (block,) = (text for text in blocks if containing in text)
    return block
