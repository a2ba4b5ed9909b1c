"""What goes wrong, in one sentence and with a remedy.

Every error a user can cause is a :class:`DistcompError`; the shell prints its sentence and exits with status
2.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class DistcompError(Exception):
    """Something the user can mend. The message says what is wrong, then what to do."""


class SettingsMismatch(DistcompError):
    """Ranks were attached with different settings; the message names the difference."""


class PeerLost(DistcompError):
    """A rank died, hangs or stopped answering; the message names it."""


class CorruptPayload(DistcompError):
    """Bytes that arrived are not the bytes that were sent; the message says which check failed and from
    whom."""


class Mismatch(DistcompError):
    """Two workers asked different things of each other in the same round; the message names both."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DistcompError(f"{module} is not installed; run: pip install 'distcomp[{extra}]'") from error
