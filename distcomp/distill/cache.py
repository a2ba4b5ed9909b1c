"""Teacher logits on disk, keyed by example: computed once, read ever after, also after a crash.

A directory with one file of records per rank. Each rank reads and appends to its own; one that has none
begins with what all others have::

    file     = one line of JSON (classes, teacher), then records
    record   = key (int64) | logits (float32 x classes) | CRC-32 of both, little-endian

A record that was torn by a crash at the end of a file is left out and written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.process_environment import read_environment

HEADER_BYTES = 256
"""The first line, padded with spaces: records then begin at one place."""
FORMAT = "distcomp logits 1"


class LogitCache:
    """Logits by key in ``directory``; ``teacher`` says whose they are (:func:`digest_of`).

    float32, bit for bit as they were computed. Keys are whole numbers, such as an example's place in the data
    set.

    Raises DistcompError for a directory that another teacher filled, and for damaged records.
    """

    def __init__(
        self, directory: str | Path, teacher: str, rank: int | None = None, alone: bool = True
    ) -> None:
        self.directory = Path(directory)
        self.teacher = teacher
        self.classes: int | None = None
        self._own = self.directory / f"rank{read_environment().rank if rank is None else rank}.logits"
        self._rows: dict[int, np.ndarray] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # A rank that has a file goes on with that one alone: another rank's row may differ in its last
            # bits, and a resumed run is to see what the uninterrupted one would have seen.
            resumed = self._own.exists()
            files = sorted(self.directory.glob("*.logits"), key=lambda path: (path == self._own, path))
            for path in [self._own] if resumed and alone else files:
                self._read(path)
            if self._rows and alone and not resumed:  # what is used from now on is there again after a crash
                begun = self._own.with_suffix(".begun")
                begun.write_bytes(
                    self._header() + b"".join(_record(key, row) for key, row in self._rows.items())
                )
                begun.replace(self._own)
        except OSError as error:
            raise DistcompError(
                f"{self.directory} cannot hold cached logits ({error}); name another directory"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: Sequence[int]) -> list[int]:
        """The positions in ``keys`` of those that have no logits yet."""
        return [position for position, key in enumerate(keys) if key not in self._rows]

    def get(self, keys: Sequence[int]) -> Tensor:
        """Their logits, float32 ``[len(keys), classes]``."""
        return torch.from_numpy(np.stack([self._rows[key] for key in keys]))

    def put(self, keys: Sequence[int], logits: Tensor) -> None:
        """Remember logits (``[len(keys), classes]``), on disk before it returns."""
        values = logits.detach().to("cpu", torch.float32).numpy()
        if values.ndim != 2 or self.classes not in (None, values.shape[1]):
            raise DistcompError(
                f"logits of shape {values.shape} do not go with the {self.classes} classes cached in "
                f"{self.directory}; cache rows of one teacher"
            )
        fresh = [(key, row) for key, row in zip(keys, values, strict=True) if key not in self._rows]
        if not fresh:
            return
        self.classes = values.shape[1]
        with open(self._own, "ab") as file:
            if file.tell() == 0:
                file.write(self._header())
            file.writelines(_record(key, row) for key, row in fresh)
            file.flush()
            os.fsync(file.fileno())
        self._rows.update((key, row.copy()) for key, row in fresh)

    def _header(self) -> bytes:
        said = {"format": FORMAT, "classes": self.classes, "teacher": self.teacher}
        line = json.dumps(said).encode()
        if len(line) >= HEADER_BYTES:
            raise DistcompError(
                f"the teacher's name takes {len(line)} bytes; give a shorter one, such as its digest_of"
            )
        return line.ljust(HEADER_BYTES - 1) + b"\n"

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        if len(data) < HEADER_BYTES:  # torn while it was begun
            if path == self._own:
                path.unlink()
            return
        self._check(path, data[:HEADER_BYTES])
        width = _width(self.classes or 0)
        whole = HEADER_BYTES + (len(data) - HEADER_BYTES) // width * width
        for key, row in _records(path, data[HEADER_BYTES:whole], width):
            self._rows[key] = row
        if whole < len(data) and path == self._own:
            os.truncate(path, whole)

    def _check(self, path: Path, header: bytes) -> None:
        try:
            said = json.loads(header)
            kind, classes, teacher = said["format"], said["classes"], said["teacher"]
        except (ValueError, KeyError, TypeError):
            kind, classes, teacher = None, None, None
        if kind != FORMAT or not isinstance(classes, int) or not 1 <= classes <= 2**24:
            raise DistcompError(f"{path} does not hold cached logits; name another directory")
        if teacher != self.teacher or self.classes not in (None, classes):
            raise DistcompError(
                f"{path} holds the logits of another teacher; name another directory, or delete this one"
            )
        self.classes = classes


def _width(classes: int) -> int:
    return 8 + 4 * classes + 4


def _record(key: int, row: np.ndarray) -> bytes:
    body: bytes = key.to_bytes(8, "little", signed=True) + row.astype("<f4").tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little")


def _records(path: Path, data: bytes, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Whole records. Raises DistcompError for one whose checksum is wrong."""
    for begin in range(0, len(data), width):
        record = data[begin : begin + width]
        body, check = record[:-4], int.from_bytes(record[-4:], "little")
        if zlib.crc32(body) != check:
            raise DistcompError(
                f"{path} is damaged at record {begin // width}; delete the file, and its logits are computed "
                "again"
            )
        yield (
            int.from_bytes(body[:8], "little", signed=True),
            np.frombuffer(body, "<f4", offset=8).astype(np.float32),
        )


def digest_of(teacher: nn.Module) -> str:
    """Names a teacher by its weights: those of another one are never taken for its own."""
    digest = hashlib.sha256(type(teacher).__name__.encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        plain = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()[:32]
