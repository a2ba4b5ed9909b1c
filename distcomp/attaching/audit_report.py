"""What an audit of collectives says: a table, a sentence, what each setting would save, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.methods.reduce_scatter import owned_layout, to_shards
from distcomp.methods.weight_gather import Difference, Gather, parse_weight_gather

HEADER_BYTES = 66
"""Ethernet, IP and TCP with timestamps, of each packet."""
ROLES = {
    "weights": "weight gathers",
    "gradients": "gradient reductions",
    "other": "other collectives",
    "distcomp": "distcomp's exchanges",
}
GRADIENTS = ("bf16", "qsgd:bits=4", "qsgd:bits=1")
WEIGHTS = ("bf16", "qsgd:bits=8", "difference:compressor=(qsgd:bits=4)")
TOGETHER = (("qsgd:bits=4", "qsgd:bits=8"), ("qsgd:bits=4", "difference:compressor=(qsgd:bits=4)"))


@dataclass(frozen=True)
class Collective:
    """A collective as one rank calls it, for ``module`` where that is known."""

    kind: str
    role: str
    """``weights``, ``gradients`` or ``other``."""
    module: str
    dtype: torch.dtype
    ranks: int
    backend: str
    numel: int
    """Elements that are handed over: a shard to be gathered, a whole buffer to be reduced."""
    asked: torch.dtype | None = None
    """The type that the script asked for, where it did."""

    @property
    def sent_bytes(self) -> int:
        """What one rank sends in one call."""
        return sent_in_call_bytes(self.kind, self.numel * self.dtype.itemsize, self.ranks, self.backend)


def sent_in_call_bytes(kind: str, nbytes: int, ranks: int, backend: str) -> int:
    """What a rank sends when each of ``ranks`` hands over ``nbytes``, the mean over the ranks.

    ::

        all_reduce                      2 (n-1)/n B
        all_gather                      (n-1) B
        reduce_scatter                  (n-1)/n B; over Gloo 2 (n-1)/n B, as its all-reduce
        all_to_all, broadcast, reduce,
        gather, scatter                 (n-1)/n B
        send                            B
    """
    if kind == "send":
        return nbytes
    scattered = 2.0 if backend == "gloo" else 1.0
    times = {"all_reduce": 2.0, "all_gather": float(ranks), "reduce_scatter": scattered}
    return round(times.get(kind, 1.0) * (ranks - 1) / ranks * nbytes)


@dataclass
class Audit:
    """What was seen in some training steps. Bytes are this rank's, of all steps together."""

    steps: int = 1
    calls: dict[Collective, int] = field(default_factory=dict)
    """How often each collective was called."""
    ledger_bytes: dict[str, int] = field(default_factory=dict)
    """What distcomp itself has sent, by kind."""
    interface_bytes: int | None = None
    """What the queue of this rank's interface has counted, headers included; None where there is none."""
    interface_packets: int = 0

    @property
    def sent_bytes(self) -> int:
        """By formula and ledger, without the packets' headers."""
        return sum(self.by_role().values())

    @property
    def interface_payload_bytes(self) -> int | None:
        """What the interface has sent without the packets' headers."""
        if self.interface_bytes is None:
            return None
        return self.interface_bytes - HEADER_BYTES * self.interface_packets

    def by_role(self) -> dict[tuple[str, str], int]:
        """Bytes by role and type; what distcomp has packed has the type ``packed``."""
        found: dict[tuple[str, str], int] = {}
        for one, count in self.calls.items():
            key = (one.role, _name(one.dtype))
            found[key] = found.get(key, 0) + count * one.sent_bytes
        for kind, nbytes in self.ledger_bytes.items():
            key = ("weights" if kind == "weights" else "distcomp", "packed")
            found[key] = found.get(key, 0) + nbytes
        return found

    @property
    def sentence(self) -> str:
        """Where most bytes go."""
        total = self.sent_bytes
        if not total:
            return "no bytes were sent"
        (role, dtype), nbytes = max(self.by_role().items(), key=lambda item: item[1])
        how = "packed" if dtype == "packed" else f"in {dtype}"
        return f"{100 * nbytes / total:.0f} % of the bytes of a step are {ROLES[role]} {how}"

    @property
    def warnings(self) -> list[str]:
        """What runs in a wider type than was asked for."""
        return [
            f"{one.module} runs its {ROLES[one.role]} in {_name(one.dtype)}, and {_name(one.asked)} was "
            f"asked for: {one.dtype.itemsize / one.asked.itemsize:g} times the bytes; look at who replaced "
            "FSDP's collectives (set_custom_all_gather, set_custom_reduce_scatter)"
            for one in self.calls
            if one.asked is not None and one.dtype.itemsize > one.asked.itemsize
        ]

    def savings(self) -> dict[tuple[str | None, str | None], int]:
        """Bytes of a step by setting: a method for gradients and one for ``weights=``, None as it is.

        By the methods' own formulas, for one layout of a buffer's length: biases and norms, which some send
        in float32, are compressed here as the rest. A method that remembers gathers once a step.
        """
        now = self.sent_bytes / self.steps
        gradients = {text: self._instead("gradients", _reduced(text)) for text in GRADIENTS}
        weights = {text: self._gathered(text) for text in WEIGHTS}
        found: dict[tuple[str | None, str | None], int] = {}
        settings = [*((g, None) for g in GRADIENTS), *((None, w) for w in WEIGHTS), *TOGETHER]
        for gradient, weight in settings:
            less = (gradients[gradient] if gradient else 0.0) + (weights[weight] if weight else 0.0)
            both = bool(gradient and weight)
            if less > 0 and not (both and (weights[weight or ""] <= 0 or gradients[gradient or ""] <= 0)):
                found[gradient, weight] = round(now - less)
        return found

    def _instead(self, role: str, price: Callable[[Collective], int]) -> float:
        """What a step would send less."""
        rows = ((one, count) for one, count in self.calls.items() if one.role == role)
        return sum(count * (one.sent_bytes - price(one)) for one, count in rows) / self.steps

    def _gathered(self, text: str) -> float:
        how = parse_weight_gather(text)
        once = isinstance(how, Difference) or (isinstance(how, Gather) and how.reuse)
        less = 0.0
        for one, count in self.calls.items():
            if one.role == "weights" and one.kind == "all_gather":
                layout = Layout.of([("shard", (one.numel, 1))])
                priced = min(count, self.steps) if once else count
                less += count * one.sent_bytes - priced * how.payload_bytes(layout, one.ranks, one.dtype)
        return less / self.steps

    def rows(self) -> list[dict[str, Any]]:
        """The table: calls and bytes of a step, the largest first."""
        seen = [
            {
                "role": one.role,
                "kind": one.kind,
                "module": one.module,
                "dtype": _name(one.dtype),
                "ranks": one.ranks,
                "calls": count / self.steps,
                "bytes": count * one.sent_bytes / self.steps,
            }
            for one, count in self.calls.items()
        ]
        own = [
            {
                "role": "weights" if kind == "weights" else "distcomp",
                "kind": kind,
                "module": "",
                "dtype": "packed",
                "ranks": 0,
                "calls": 0,
                "bytes": nbytes / self.steps,
            }
            for kind, nbytes in self.ledger_bytes.items()
        ]
        return sorted([*seen, *own], key=lambda row: -float(row["bytes"]))

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "steps": self.steps,
            "rows": self.rows(),
            "sent_bytes": self.sent_bytes,
            "interface_bytes": self.interface_bytes,
            "interface_payload_bytes": self.interface_payload_bytes,
            "sentence": self.sentence,
            "warnings": self.warnings,
            "savings": [
                {"method": gradient, "weights": weight, "bytes": nbytes}
                for (gradient, weight), nbytes in self.savings().items()
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        line = "{:<10} {:<15} {:<20} {:<9} {:>5} {:>6} {:>9}".format
        yield line("role", "kind", "module", "type", "ranks", "calls", "kB a step")
        for row in self.rows():
            calls = f"{row['calls']:g}" if row["calls"] else ""
            named = (row["role"], row["kind"], row["module"][-20:], row["dtype"], row["ranks"] or "")
            yield line(*named, calls, f"{row['bytes'] / 1e3:.1f}")
        now = self.sent_bytes / self.steps
        yield f"{now / 1e3:.1f} kB a step and rank: {self.sentence}."
        if self.interface_payload_bytes is not None:
            payload = self.interface_payload_bytes / self.steps
            yield f"The interface sent {payload / 1e3:.1f} kB a step, without the packets' headers."
        for sentence in self.warnings:
            yield f"Warning: {sentence}."
        for (gradient, weight), nbytes in self.savings().items():
            asked = ", ".join(filter(None, (gradient and f'"{gradient}"', weight and f'weights="{weight}"')))
            yield f"With {asked}: {nbytes / 1e3:.1f} kB, {100 * (1 - nbytes / now):.0f} % less."


def _reduced(text: str) -> Callable[[Collective], int]:
    """What a method sends in the place of a reduction."""
    method: Method = parse(text)

    def price(one: Collective) -> int:
        if one.kind == "reduce_scatter":
            layout = owned_layout("gradients", one.numel, one.ranks)
            return to_shards(method).payload_bytes(layout, one.ranks, 0)
        return method.payload_bytes(Layout.of([("gradients", (one.numel, 1))]), one.ranks, 0)

    return price


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
