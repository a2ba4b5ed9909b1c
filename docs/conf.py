"""How the documentation is built: ``sphinx-build -b html docs docs/_build/html``."""

import builtins
import importlib
import sys
from functools import lru_cache
from pathlib import Path

from docutils import nodes

from distcomp import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import catalogue  # noqa: E402
import notebook  # noqa: E402
import reachable  # noqa: E402
import reference  # noqa: E402
import sentences  # noqa: E402

project = "distcomp"
author = "the distcomp authors"
project_copyright = "the distcomp authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]  # no mathematics that a browser asks another host for
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True
autodoc_inherit_docstrings = False  # those of torch.nn.Module refer to pages of torch's
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"
html_title = f"distcomp {__version__}"
html_static_path = ["static"]
html_extra_path = ["../llms.txt"]
html_css_files = ["narrow.css"]
html_js_files = ["reachable.js"]
html_theme_options = {"top_of_page_buttons": []}  # a page's source is where the project is


def setup(app):
    """The pages of methods, names and errors are written from the code: they can neither lag nor lie."""
    for pages in (catalogue, reference, sentences, notebook):
        app.connect("builder-inited", lambda _, write=pages.write: write(HERE))
    app.connect("autodoc-process-docstring", docstring)
    app.connect("missing-reference", named_otherwise)
    app.connect("html-page-context", reachable.rewrite)


def docstring(_app, _what, _name, _thing, _options, lines):
    """Docstrings are written to be read in a terminal."""
    lines[:] = reference.as_restructured(lines)


def named_otherwise(app, _env, node, shown):
    """Names of ours by the page that they have; names of libraries as they are. Others are mistakes."""
    if node.get("refdomain") != "py":
        return None
    page = reference.home_of(node["reftarget"])
    if page is not None:
        uri = app.builder.get_relative_uri(node["refdoc"], page)
        return nodes.reference("", "", shown, internal=True, refuri=uri)
    told = node["reftarget"].partition("[")[0].lstrip("~")  # a type may be cut at its arguments
    return shown if exists(told) or inherited(told, node) else None


def inherited(name, node):
    """Whether the class that is documented has an attribute of that name, documented itself or not."""
    room = sys.modules.get(node.get("py:module") or "")
    return hasattr(getattr(room, node.get("py:class") or "", None), name)


@lru_cache(maxsize=4096)
def exists(target):
    """Whether there is such a thing, public or not: in a library, or by that name in a module of ours."""
    first, _, rest = target.partition(".")
    if hasattr(builtins, first) or (not rest and len(target) == 1):  # a type variable
        return True
    parts = target.split(".")
    for length in range(target.count("."), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        if found is not None:
            return True
    ours = [one for name, one in list(sys.modules.items()) if name.startswith("distcomp.")]
    return any(first in vars(one) for one in ours)
