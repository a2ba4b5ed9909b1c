"""``python -m distcomp`` is the ``distcomp`` command."""

import sys

from distcomp.cli import main

sys.exit(main())
