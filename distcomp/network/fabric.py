"""What network is it? Ranks, the rate of each rank's link, delays, and racks behind slower uplinks.

A :class:`Fabric` is pure data: the emulator builds it out of network namespaces, the model predicts seconds
with it. As a file it is TOML::

    ranks = 8
    rate = "1gbit"             # every rank's link, each way; "unshaped" for no limit (the default)
    delay = "100us"            # one way, between two ranks of one rack; default 0

    [rates]                    # ranks whose link differs
    3 = "100mbit"

    [[rack]]                   # racks are optional; with racks, each rank is in exactly one
    ranks = [0, 1, 2, 3]
    uplink = "200mbit"         # all that leaves or enters the rack shares this, each way
    delay = "5ms"              # added once on the way out of the rack and once on the way in; default 0

    [[rack]]
    ranks = [4, 5, 6, 7]
    uplink = "200mbit"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distcomp.errors import DistcompError
from distcomp.network.units import UNSHAPED, format_rate, format_time, parse_rate, parse_time

MOST_RANKS = 100_000


@dataclass(frozen=True)
class Rack:
    """Ranks that share one uplink of `uplink_bps` each way; crossing it costs `delay_s` one way."""

    ranks: tuple[int, ...]
    uplink_bps: float = UNSHAPED
    delay_s: float = 0.0


@dataclass(frozen=True)
class Fabric:
    """The links between ``len(rates_bps)`` ranks, in bits and seconds.

    ``rates_bps[r]`` is the rate of rank r's own link, each way (full duplex); ``inf`` is unshaped. A message
    from a to b leaves at a's rate, passes the uplinks of their racks when those differ, and arrives at b's
    rate. One way takes ``delay_s``, plus both racks' ``delay_s`` when it crosses. DistcompError where this
    makes no sense.
    """

    rates_bps: tuple[float, ...]
    delay_s: float = 0.0
    racks: tuple[Rack, ...] = ()

    def __post_init__(self) -> None:
        if not self.rates_bps:
            raise DistcompError("a fabric needs at least one rank; give ranks = 1 or more")
        for rate_bps in (*self.rates_bps, *(rack.uplink_bps for rack in self.racks)):
            parse_rate(rate_bps)
        for delay_s in (self.delay_s, *(rack.delay_s for rack in self.racks)):
            parse_time(delay_s)
        if self.racks:
            _check_partition(self.racks, self.ranks)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.rates_bps)

    @classmethod
    def uniform(cls, ranks: int, rate: str | float = UNSHAPED, delay: str | float = 0.0) -> Fabric:
        """Equal links, no racks: ``Fabric.uniform(4, "100mbit", "20ms")``."""
        return cls((parse_rate(rate),) * _count(ranks), parse_time(delay))

    @classmethod
    def from_toml(cls, path: str | Path) -> Fabric:
        """The fabric described in a TOML file (see this module's docstring)."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DistcompError(f"the fabric {path} cannot be read ({error}); give a TOML file") from None
        try:
            return cls.parse(text)
        except DistcompError as error:
            raise DistcompError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Fabric:
        """The fabric described in TOML text (see this module's docstring)."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise DistcompError(f"this is not TOML ({error}); correct the file at that place") from None
        _check_keys(table, ("ranks", "rate", "delay", "rates", "rack"), "a fabric")
        if "ranks" not in table:
            raise DistcompError("a fabric must say how many ranks there are; add a line such as ranks = 4")
        rates_bps = [parse_rate(table.get("rate", "unshaped"))] * _count(table["ranks"])
        for rank, rate in _rates(table.get("rates", {}), len(rates_bps)):
            rates_bps[rank] = rate
        return cls(tuple(rates_bps), parse_time(table.get("delay", 0.0)), _racks(table.get("rack", [])))

    def to_toml(self) -> str:
        """The text from which :meth:`parse` makes an equal fabric."""
        common = max(self.rates_bps, key=self.rates_bps.count)
        text = (
            f'ranks = {self.ranks}\nrate = "{format_rate(common)}"\ndelay = "{format_time(self.delay_s)}"\n'
        )
        if len(set(self.rates_bps)) > 1:
            text += "\n[rates]\n"
        for rank, rate_bps in enumerate(self.rates_bps):
            text += "" if rate_bps == common else f'{rank} = "{format_rate(rate_bps)}"\n'
        for rack in self.racks:
            uplink, delay = format_rate(rack.uplink_bps), format_time(rack.delay_s)
            text += f'\n[[rack]]\nranks = {list(rack.ranks)}\nuplink = "{uplink}"\ndelay = "{delay}"\n'
        return text

    def of(self, ranks: int) -> Fabric:
        """The same kind of fabric for another number of ranks: racks as large as the first, equal links.

        DistcompError where links or racks differ, for then there is no saying what more of them would be.
        """
        alike = {(len(rack.ranks), rack.uplink_bps, rack.delay_s) for rack in self.racks}
        if len(set(self.rates_bps)) > 1 or len(alike) > 1:
            raise DistcompError(
                f"the fabric has {self.ranks} ranks that are not alike, and cannot be made {_count(ranks)}; "
                "write a fabric of that size"
            )
        rates_bps = self.rates_bps[:1] * _count(ranks)
        if not self.racks:
            return Fabric(rates_bps, self.delay_s)
        size, uplink_bps, delay_s = alike.pop()
        starts = range(0, ranks, size)
        racks = (Rack(tuple(range(at, min(at + size, ranks))), uplink_bps, delay_s) for at in starts)
        return Fabric(rates_bps, self.delay_s, tuple(racks))

    def rack_of(self, rank: int) -> int:
        """Which rack a rank is in; 0 for all where there are no racks."""
        return next((index for index, rack in enumerate(self.racks) if rank in rack.ranks), 0)

    def path_rate_bps(self, source: int, target: int) -> float:
        """The slowest link a message from `source` to `target` passes, with nobody else sending."""
        crossing = self._crossed(source, target)
        links = [self.rates_bps[source], self.rates_bps[target], *(rack.uplink_bps for rack in crossing)]
        return UNSHAPED if source == target else min(links)

    def path_delay_s(self, source: int, target: int) -> float:
        """One-way delay from `source` to `target`."""
        uplinks_s = sum(rack.delay_s for rack in self._crossed(source, target))
        return 0.0 if source == target else self.delay_s + uplinks_s

    def _crossed(self, source: int, target: int) -> tuple[Rack, ...]:
        here, there = self.rack_of(source), self.rack_of(target)
        return () if here == there else (self.racks[here], self.racks[there])


def _count(ranks: object) -> int:
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise DistcompError(f"the number of ranks is {ranks!r}; give a whole number of 1 or more")
    if ranks > MOST_RANKS:
        raise DistcompError(f"the number of ranks is {ranks}; a fabric has {MOST_RANKS:,} at most")
    return ranks


def _check_keys(table: Mapping[str, object], known: tuple[str, ...], what: str) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise DistcompError(f"{what} has no setting {key!r}; {remedy}")


def _rates(table: Any, ranks: int) -> Iterable[tuple[int, float]]:
    if not isinstance(table, dict):
        raise DistcompError('"rates" is not a table; write [rates] and below it lines such as 3 = "100mbit"')
    for key, rate in table.items():
        if not (key.isascii() and key.isdecimal() and int(key) < ranks):
            raise DistcompError(f"[rates] names {key!r}, which is no rank; ranks are 0 to {ranks - 1}")
        yield int(key), parse_rate(rate)


def _racks(tables: Any) -> tuple[Rack, ...]:
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise DistcompError('"rack" is not a list of tables; write [[rack]] with two brackets for each rack')
    racks = []
    for table in tables:
        _check_keys(table, ("ranks", "uplink", "delay"), "a rack")
        ranks = table.get("ranks")
        if not (isinstance(ranks, list) and all(isinstance(rank, int) for rank in ranks)):
            raise DistcompError("a rack must list its ranks; write ranks = [0, 1]")
        uplink, delay = parse_rate(table.get("uplink", "unshaped")), parse_time(table.get("delay", 0.0))
        racks.append(Rack(tuple(ranks), uplink, delay))
    return tuple(racks)


def _check_partition(racks: tuple[Rack, ...], ranks: int) -> None:
    if any(not rack.ranks for rack in racks):
        raise DistcompError("a rack is empty; give it ranks or remove it")
    placed: set[int] = set()
    for rank in (rank for rack in racks for rank in rack.ranks):
        if not 0 <= rank < ranks:
            raise DistcompError(f"a rack names rank {rank}, which does not exist; ranks are 0 to {ranks - 1}")
        if rank in placed:
            raise DistcompError(f"rank {rank} is in two racks; put it in one")
        placed.add(rank)
    missing = sorted(set(range(ranks)) - placed)
    if missing:
        raise DistcompError(f"rank {missing[0]} is in no rack; with racks, each rank must be in one")
