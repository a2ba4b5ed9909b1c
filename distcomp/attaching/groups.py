"""Process groups of distcomp's own: one for each model that is attached, used again when it has been left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist

from distcomp.private_torch import name_of, next_group_named
from distcomp.transports.agreement import PROPOSED
from distcomp.transports.bounded import ask_store
from distcomp.transports.types import Store

FREE, MADE = PROPOSED + "free groups", PROPOSED + "groups made"


@dataclass
class Pool:
    """The groups over the ranks of one parent, by the order in which they were made: the same on all ranks.

    A group costs file descriptors and threads, and torch does not take one down without trace (its names
    count the groups that there are, and lead to addresses in the store that nobody answers any more). So a
    group is kept, and given to the next model: the first that is free *on every rank*, as ranks may leave
    models in different orders. One over which an exchange failed is never used again.
    """

    made: int = 0
    free: dict[int, dist.ProcessGroup] = field(default_factory=dict)
    connection: Store | None = None

    def store(self, parent: dist.ProcessGroup) -> Store:
        """The rendezvous store, over a connection of its own: what waits on the group's, elsewhere, keeps it.

        One for all models of the group: torch's host asks the name server who each new connection is, and
        answers nobody meanwhile.
        """
        if self.connection is None:
            self.connection = ask_store(parent.get_group_store().clone)  # type: ignore[attr-defined]
        return self.connection

    def proposal(self) -> dict[str, str]:
        """What this rank says of it before all choose."""
        return {FREE: " ".join(map(str, sorted(self.free))), MADE: str(self.made)}

    def take(
        self, parent: dist.ProcessGroup, proposals: Sequence[Mapping[str, str]], timeout_s: float
    ) -> tuple[int, dist.ProcessGroup]:
        """The group that all choose from what all have said, with its number. Waits at most ``timeout_s`` for
        the others where it is new."""
        common = set.intersection(*(set(map(int, one[FREE].split())) for one in proposals))
        patience = timedelta(seconds=timeout_s)
        if common:
            number = min(common)
            group = self.free.pop(number)
            if dist.get_backend(group) in ("gloo", "nccl"):
                group.set_timeout(patience)
            return number, group
        number = max(int(one[MADE]) for one in proposals)
        self.made = number + 1
        members = [dist.get_global_rank(parent, rank) for rank in range(dist.get_world_size(parent))]
        backend = dist.get_backend(parent)
        with next_group_named(f"distcomp {name_of(parent)} {number}"):
            made = dist.new_group(members, timeout=patience, backend=backend, use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        _OWN.add(made)
        return number, made


_OWN: WeakSet[dist.ProcessGroup] = WeakSet()


def is_own(group: dist.ProcessGroup) -> bool:
    """Whether a group was made here: what goes over it is in a ledger."""
    return group in _OWN


_POOLS: WeakKeyDictionary[dist.ProcessGroup, Pool] = WeakKeyDictionary()


def pool_of(parent: dist.ProcessGroup) -> Pool:
    """The pool of groups over the ranks of ``parent``."""
    return _POOLS.setdefault(parent, Pool())
