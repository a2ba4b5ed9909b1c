"""What did a run save, and what did it cost? A table, and one page that asks nothing of any other host."""

from distcomp.report.figures import Comparison, compare
from distcomp.report.page import page
from distcomp.report.table import as_json, as_text

__all__ = ["Comparison", "as_json", "as_text", "compare", "page"]
