"""What Sphinx writes, mended for screen readers: benchmarks/docs_pages.py asks axe-core."""

import re

SIGNATURE = re.compile(r"(<dt class=\"sig .*?</dt>)", re.DOTALL)
CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
TEXT = re.compile(r'(?<=<span class="pre">)[^<]*')
LINES = (
    ("<dl>", '<span class="sig-lines">'),
    ("</dl>", "</span>"),
    ("<dd>", '<span class="sig-line">'),
    ("</dd>", "</span>"),
)


def rewrite(_app, _page, _template, context, _doctree):
    """The page's body: no empty heading of a column, no list of definitions that defines nothing, no table
    whose first column is a letter wide because another holds one long word."""
    if "body" not in context:
        return
    body = re.sub(r'<th class="head">(<p></p>)?</th>', "<td></td>", context["body"])
    body = CELL.sub(lambda found: _breaking(found[0]), body)
    context["body"] = SIGNATURE.sub(lambda found: _in_spans(found[1]), body)


def _breaking(cell):
    """A method's text in a table may break behind a comma, a colon and an underscore, not within a word."""
    return TEXT.sub(lambda found: re.sub(r"([,:_])(?=\w)", r"\1<wbr>", found[0]), cell)


def _in_spans(signature):
    """A signature of several lines, which Sphinx writes as definitions without a term."""
    for old, new in LINES:
        signature = signature.replace(old, new)
    return signature
