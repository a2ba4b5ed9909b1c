"""Counter-based random keys: a function of seed, step, round, parameter and rank, never of the global
generator.

A :class:`Key` is 64 bits. ``key.fold("scatter", 3)`` gives an independent key; element *i* of a tensor then
takes the
*i*-th number of its key (see :mod:`distcomp.kernels`). A resumed run repeats itself, and no two rounds share
noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import torch


@dataclass(frozen=True)
class Key:
    """A 64-bit key; folding names into it gives new ones (BLAKE2b, so that streams do not overlap by
    design)."""

    bits: int

    @staticmethod
    def of(*parts: int | str) -> Key:
        return Key(0).fold(*parts)

    def fold(self, *parts: int | str) -> Key:
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
        digest = blake2b(text.encode(), digest_size=8, key=self.bits.to_bytes(8, "little")).digest()
        return Key(int.from_bytes(digest, "little"))

    def fold_each(self, names: Iterable[str]) -> list[int]:
        """``[self.fold(name).bits for name in names]``, for many names."""
        key = self.bits.to_bytes(8, "little")
        read = int.from_bytes
        return [
            read(blake2b(f"str:{name}".encode(), digest_size=8, key=key).digest(), "little") for name in names
        ]

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by this key, for draws that no kernel makes (permutations, start
        matrices)."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def seed(self) -> int:
        """What seeds a generator of torch: 63 of the bits."""
        return self.bits & (2**63 - 1)
