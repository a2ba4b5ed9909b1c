"""The tutorial's page, written from its notebook, with the outputs that are kept in it."""

import json
from collections.abc import Iterator
from pathlib import Path

NAME = "tutorial"


def cells(path: Path) -> list[dict]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def printed(cell: dict) -> str:
    """What a cell's kept outputs print."""
    return "".join("".join(output["text"]) for output in cell["outputs"])


def page(path: Path) -> str:
    """Text as it is, code and what it prints in fences."""
    return "\n\n".join(_parts(path)) + "\n"


def write(docs: Path) -> None:
    """Write the page if it changed."""
    made, text = docs / f"{NAME}.md", page(docs / f"{NAME}.ipynb")
    if not made.exists() or made.read_text(encoding="utf-8") != text:
        made.write_text(text, encoding="utf-8")


def _parts(path: Path) -> Iterator[str]:
    for cell in cells(path):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield text
            continue
        yield f"```python\n{text}\n```"
        if cell["outputs"]:
            yield f"```text\n{printed(cell).rstrip()}\n```"
