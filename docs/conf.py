"""How the documentation is built: ``sphinx-build -b html docs docs/_build/html``."""

import sys
from pathlib import Path

from distcomp import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import catalogue  # noqa: E402

project = "distcomp"
author = "the distcomp authors"
project_copyright = "the distcomp authors"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]  # no mathematics that a browser asks another host for
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"distcomp {__version__}"


def setup(app):
    """The pages of methods are written from the registry, so that they can neither lag nor lie."""
    app.connect("builder-inited", lambda _: catalogue.write(HERE))
