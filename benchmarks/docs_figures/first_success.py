"""docs/decisions/first-success.md: a stranger's ways, timed, the report's page and the docs in a browser."""

from __future__ import annotations

from typing import Any

from benchmarks._tables import Block, markdown, result, source


def paths() -> str:
    """Commands, minutes, files of each way."""
    found = result("newcomer")
    rows = [
        [name, str(way["commands"]), f"{way['minutes']:.1f}", ", ".join(way["own_files"]) or "none",
         str(way["changed_lines"]), f"`{way['end']}`"]
        for name, way in found["paths"].items()
    ]  # fmt: skip
    head = [
        "from ... to ...",
        "commands",
        "minutes",
        "files of one's own",
        "lines changed in the script",
        "ends with",
    ]
    typed = "\n".join(
        f"* {name}: " + "; ".join(f"`{step['typed']}` ({step['seconds']:.0f} s)" for step in way["steps"])
        for name, way in found["paths"].items()
    )
    commit = found["commits"]["paths"]
    return f"{markdown(head, rows)}\n\n{typed}\n\n{source(found | {'commit': commit}, 'newcomer.py paths')}"


def _row(look: dict[str, Any]) -> list[str]:
    stops, saved = look["stops"], look["saved"]
    return [
        f"{look['width']} px, {look['scheme']}", f"{look['open_s']:.2f} s", str(len(look["violations"])),
        str(look["passes"]), str(len(look["requests"])), f"{stops['seen']} of {stops['stops']}",
        f"{saved['svg']} SVG, {saved['csv']} CSV",
    ]  # fmt: skip


def opened() -> str:
    """Size, seconds, findings."""
    found = result("report_axe")
    rows = [_row(look) for look in found["looks"]]
    head = [
        "",
        "open after",
        "axe violations",
        "axe rules passed",
        "requests",
        "Tab stops seen and named",
        "saved",
    ]
    said = (
        f"{found['runs']} runs of {found['steps']:,} steps: {found['page_bytes'] / 1e6:.2f} MB, in "
        f"{found['browser'].replace('Chrome/', 'Chromium ')} with axe-core {found['axe']}."
    )
    return f"{markdown(head, rows)}\n\n{said} {source(found, 'report_page.py')}"


def docs() -> str:
    """What axe-core found on pages of the docs, at both widths, light and dark."""
    found = result("docs_axe")
    rows = [
        [
            f"`{page}`",
            str(sum(len(look["violations"]) for look in looks)),
            str(max(look["passes"] for look in looks)),
            str(sum(len(look["requests"]) for look in looks)),
        ]
        for page, looks in found["pages"].items()
    ]
    head = ["page", "axe violations, four looks", "axe rules passed", "requests"]
    said = f"{found['browser'].replace('Chrome/', 'Chromium ')} with axe-core {found['axe']}."
    return f"{markdown(head, rows)}\n\n{said} {source(found, 'docs_pages.py')}"


BLOCKS = {
    "paths": Block(paths, "newcomer", key="paths"),
    "opened": Block(opened, "report_axe"),
    "docs": Block(docs, "docs_axe"),
}
