"""Files that a command writes: whole or not at all, and never over a file of another kind."""

from __future__ import annotations

from pathlib import Path

from distcomp.atomic_write import write_whole
from distcomp.errors import DistcompError

FIRST_BYTES = 4096


def write_output(path: Path, data: bytes | memoryview, mark: bytes, kind: str) -> None:
    """Write ``data``. What is there already is replaced if it is a ``kind``, too: if ``mark`` stands in its
    beginning.

    Raises DistcompError where it is something else, or cannot be written.
    """
    try:
        if path.exists() and mark not in _beginning(path):
            raise DistcompError(
                f"{path} is there already and is no {kind}, so it is left alone; name another file with -o"
            )
        write_whole(path, data)
    except OSError as error:
        raise DistcompError(f"{path} cannot be written ({error}); name another file with -o") from None


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(FIRST_BYTES)
