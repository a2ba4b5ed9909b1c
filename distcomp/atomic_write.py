"""A file is written whole or not at all, and never through a link that somebody else has laid."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` as :func:`write_chunks` does."""
    write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write beside ``path`` under a name that nobody knows beforehand, then move it there.

    Raises OSError, and leaves nothing behind.
    """
    beside = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(beside, flags, 0o666), "wb") as file:
        try:
            file.writelines(chunks)
            file.close()
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
