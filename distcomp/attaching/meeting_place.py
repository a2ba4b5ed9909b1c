"""Where workers of outer rounds meet: in the rendezvous store, under a name that whoever joins knows.

Those who attach together (the founders) leave there who they are and what they attached. One who joins later
is a world of its own, and knows the store's address alone.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distcomp.attaching.session import Meeting
from distcomp.averaging.base import Averaging
from distcomp.errors import DistcompError, PeerLost, SettingsMismatch
from distcomp.private_torch import name_of
from distcomp.transports.bounded import ask_store, bounded
from distcomp.transports.types import PrefixStore, Store, TCPStore


@dataclass(frozen=True)
class MeetingPlace:
    """The store, under the prefix of one attachment; worker ``me``'s number, and those of the founders."""

    store: Store
    me: int
    founders: tuple[int, ...]

    @staticmethod
    def founded(
        group: dist.ProcessGroup, store: Store, name: str, settings: Mapping[str, Any], timeout_s: float
    ) -> MeetingPlace:
        """Of the ranks of ``group``, which call it together. ``store``: their own; ``name``: of the
        attachment."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        root, key = _root(store), f"distcomp/{name}/rounds"
        founders = tuple(range(size))
        if rank == 0:
            token = secrets.token_hex(8)
            place = PrefixStore(f"distcomp/rounds/{token}", root)
            said = {"settings": json.dumps(settings), "latest": json.dumps([0, founders])}
            for what, value in said.items():
                ask_store(lambda what=what, value=value: place.set(what, value))  # type: ignore[misc]
            ask_store(lambda: place.add("workers", size))
            ask_store(lambda: root.set(_pointer(group, name), token))
            ask_store(lambda: store.set(key, token))
        token = _awaited(store, key, timeout_s, "rank 0 did not open the rounds")
        return MeetingPlace(PrefixStore(f"distcomp/rounds/{token}", root), rank, founders)

    @staticmethod
    def joined(
        address: str, group: dist.ProcessGroup, name: str, settings: Mapping[str, Any], timeout_s: float
    ) -> MeetingPlace:
        """Of a worker that is a world of its own: ``address`` is ``HOST:PORT`` of the founders' store.

        Raises PeerLost where nobody is there, SettingsMismatch where they attached something else.
        """
        host, port = _parsed(address)
        patience = timedelta(seconds=timeout_s)
        silent = f"no rendezvous store answers at {address}"
        try:
            root = bounded(
                lambda: TCPStore(host, port, None, False, patience, wait_for_workers=False),
                timeout_s + 1.0,
                silent,
            )
        except RuntimeError as error:
            raise PeerLost(
                f"{silent} ({str(error).splitlines()[0][:200]}); give the MASTER_ADDR:MASTER_PORT of those "
                "who began, from where it can be reached"
            ) from error
        token = _awaited(root, _pointer(group, name), timeout_s, f"nobody holds rounds at {address}")
        store = PrefixStore(f"distcomp/rounds/{token}", root)
        theirs = json.loads(ask_store(lambda: store.get("settings")))
        _compare(theirs, json.loads(json.dumps(settings)))
        me = ask_store(lambda: store.add("workers", 1)) - 1
        _, founders = json.loads(ask_store(lambda: store.get("latest")))
        return MeetingPlace(store, me, tuple(founders))


def place_of(
    chosen: object, meeting: Meeting, settings: Mapping[str, Any], join: str | None
) -> MeetingPlace | None:
    """Where rounds are held, if ``chosen`` holds any; of those who attach together, or of one who joins.

    Raises DistcompError for one who joins what holds none, or is no world of its own.
    """
    holds = isinstance(chosen, Averaging) and chosen.holds_rounds and chosen.lateness is not None
    if join is None:
        if not holds:
            return None
        return MeetingPlace.founded(meeting.group, meeting.store, meeting.name, settings, meeting.timeout_s)
    if not holds:
        raise DistcompError(
            f"nobody joins {chosen} later; use periodic averaging with on_failure='continue', such as "
            "'diloco:on_failure=continue'"
        )
    if meeting.size != 1:
        raise DistcompError(
            f"one who joins is a world of its own, and this one has {meeting.size} ranks; start it with "
            "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, "
            "world_size=1)"
        )
    return MeetingPlace.joined(join, meeting.group, meeting.name, settings, meeting.timeout_s)


def _root(store: Store) -> Store:
    """The store without any prefix, over a connection of its own: what one who joins sees."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    cloned: Store = ask_store(store.clone)  # type: ignore[attr-defined]
    return cloned


def _pointer(group: dist.ProcessGroup, name: str) -> str:
    return f"distcomp/rounds of {name_of(group)}/{name}"


def _awaited(store: Store, key: str, timeout_s: float, sentence: str) -> str:
    def read() -> bytes:
        store.wait([key], timedelta(seconds=timeout_s))
        return store.get(key)

    with suppress(RuntimeError):
        return bounded(read, timeout_s + 1.0, sentence).decode()
    raise PeerLost(
        f"{sentence} within timeout_s={timeout_s:g}; attach the founders first, with on_failure='continue' "
        "and the same model and method"
    )


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise DistcompError(
            f"join is {address!r}; give HOST:PORT of the others' rendezvous store (their MASTER_ADDR and "
            "MASTER_PORT)"
        )
    return host, int(port)


def _compare(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*theirs, *mine]):
        if theirs.get(name) != mine.get(name):
            first, second = str(theirs.get(name)), str(mine.get(name))
            raise SettingsMismatch(
                f"this worker was to join with another {name}: the others have {first[:300]} and it has "
                f"{second[:300]}; give it the same"
            )
