"""A directory of updates, as an object store has it: one object a part, written whole, read by name.

::

    000000000064.difference.0-of-1.dcu    version 64 from version 63, part 0 of 1
    000000000064.key.0-of-1.dcu           all of version 64
    wanted.key                            somebody asks for a key frame
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distcomp.atomic_write import write_chunks
from distcomp.errors import DistcompError
from distcomp.files.coding import CorruptFile
from distcomp.updates.stream import Receiver
from distcomp.updates.update import Update, merge_parts, read_update

OBJECT = re.compile(r"(\d{12})\.(key|difference)\.(\d{1,5})-of-(\d{1,5})\.dcu")
WANTED = "wanted.key"


@dataclass(frozen=True)
class StoredVersion:
    """The objects of one version's difference or key frame, all parts of it."""

    number: int
    key: bool
    parts: tuple[Path, ...]
    nbytes: int


class UpdateDirectory:
    """A directory that one trainer writes, every rank of it, and any number of receivers read.

    A trainer that is started anew over the same directory goes on counting:
    ``Publisher(state, number=store.newest)``. Where it began at 0 again, receivers would hold its versions
    for old ones until it has passed theirs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, updates: Iterable[Update]) -> list[Path]:
        """Write updates (a :class:`Publication` is some), each whole or not at all. What is there under the
        same name is replaced."""
        written = []
        for update in updates:
            kind = "key" if update.key else "difference"
            path = self.path / f"{update.number:012}.{kind}.{update.part}-of-{update.parts}.dcu"
            write_chunks(path, update.chunks())
            written.append(path)
        return written

    def versions(self) -> list[StoredVersion]:
        """What is there whole, in order of version; what is none of ours is passed over."""
        objects: dict[tuple[int, bool, int], dict[int, Path]] = {}
        for path in self.path.iterdir():
            name = OBJECT.fullmatch(path.name)
            if name is not None:
                number, kind, part, parts = name.groups()
                objects.setdefault((int(number), kind == "key", int(parts)), {})[int(part)] = path
        whole = []
        for (number, key, parts), paths in sorted(objects.items()):
            nbytes = _size_of(paths.values())
            if sorted(paths) == list(range(parts)) and nbytes is not None:
                whole.append(StoredVersion(number, key, tuple(paths[part] for part in range(parts)), nbytes))
        return whole

    @property
    def newest(self) -> int:
        """The number of the newest version that is there whole; 0 where there is none."""
        return max((version.number for version in self.versions()), default=0)

    def read(self, version: StoredVersion) -> Update:
        """A version, its parts merged. Raises CorruptFile, also where another was written under its name."""
        try:
            update = merge_parts([read_update(path) for path in version.parts])
        except OSError as error:
            raise CorruptFile(f"update {version.number} cannot be read ({error}); get it again") from error
        if (update.number, update.key) != (version.number, version.key):
            raise CorruptFile(
                f"the object of update {version.number} holds update {update.number}: they were swapped; get "
                "it again"
            )
        return update

    def prune(self, keep: int = 2) -> None:
        """Remove what is older than the ``keep`` newest key frames: a late receiver begins with one of
        these."""
        keys = [version.number for version in self.versions() if version.key]
        oldest = keys[-keep] if len(keys) >= keep > 0 else 0
        for version in self.versions():
            if version.number < oldest or (version.number == oldest and not version.key):
                for path in version.parts:
                    path.unlink(missing_ok=True)

    def ask_for_key(self) -> None:
        """Ask the trainer for a key frame with its next version."""
        (self.path / WANTED).touch()

    def key_is_wanted(self) -> bool:
        """Whether somebody asked; asked once, it is answered.

        Of a sharded trainer one rank calls it and tells the others (``broadcast_object_list``): whoever calls
        first takes the question away, and all ranks must publish alike.
        """
        wanted = self.path / WANTED
        asked = wanted.exists()
        wanted.unlink(missing_ok=True)
        return asked

    def catch_up(self, receiver: Receiver) -> list[str]:
        """Bring a receiver to the newest version that can be reached, over the fewest bytes.

        Differences one after the other where they are all there, or a key frame and those after it. What is
        missing or damaged on the way is named in what is returned, and healed by a key frame; where there is
        none the trainer is asked for it, and the receiver stays at an exact earlier version.

        Raises DistcompError for a receiver whose tensors are sharded over several ranks: each would find
        other objects, and wait for the others while they apply none.
        """
        if receiver.is_sharded:
            raise DistcompError(
                "the receiver's tensors are sharded over several ranks, and each may find other updates in "
                "the directory; use receive_from_group, or catch up with whole tensors and shard those"
            )
        troubles: list[str] = []
        damaged: set[tuple[Path, ...]] = set()
        while True:
            versions = self.versions()
            whole = [version for version in versions if version.parts not in damaged]
            way = _way(receiver.number, whole)
            if not way:
                break
            if way[0].key and receiver.number is not None and not _leads_on(receiver.number, whole):
                troubles.append(
                    f"{receiver.missing(_next(receiver.number, whole))}; a key frame brings version "
                    f"{way[0].number}"
                )
            damage = self._go(way, receiver, damaged)
            troubles += [damage] if damage else []
        newest = max((version.number for version in versions), default=-1)
        have = -1 if receiver.number is None else receiver.number
        if newest > have:
            differences = [version for version in whole if version.number > have]
            troubles += [receiver.missing(min(v.number for v in differences))] if differences else []
            troubles.append(f"there is no way to version {newest} yet; a key frame was asked for")
            self.ask_for_key()
        return troubles

    def _go(
        self, way: Sequence[StoredVersion], receiver: Receiver, damaged: set[tuple[Path, ...]]
    ) -> str | None:
        for version in way:
            try:
                receiver.receive(self.read(version))
            except DistcompError as error:
                damaged.add(version.parts)
                return str(error)
        return None


def _size_of(paths: Iterable[Path]) -> int | None:
    try:
        return sum(path.stat().st_size for path in paths)
    except OSError:
        return None  # removed since it was listed


def _leads_on(number: int, versions: Sequence[StoredVersion]) -> bool:
    return any(version.number == number + 1 and not version.key for version in versions)


def _next(number: int, versions: Sequence[StoredVersion]) -> int:
    """The first version after this that is there."""
    return min(version.number for version in versions if version.number > number)


def _way(number: int | None, versions: Sequence[StoredVersion]) -> list[StoredVersion]:
    """The updates that lead furthest, and over the fewest bytes of those; none where nothing leads on."""
    differences = {version.number: version for version in versions if not version.key}

    def onwards(at: int) -> Iterator[StoredVersion]:
        while at + 1 in differences:
            at += 1
            yield differences[at]

    ways = [] if number is None else [list(onwards(number))]
    newer = [version for version in versions if version.key and (number is None or version.number > number)]
    ways = [way for way in [*ways, *([key, *onwards(key.number)] for key in newer)] if way]
    return max(ways, key=lambda way: (way[-1].number, -sum(version.nbytes for version in way)), default=[])
