"""What a profile is made of: an exchange among ranks that do not all say the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.advice.profile import REPEATS, WARM_UP, profiles_of
from distcomp.compressors import Compressor, TopK
from distcomp.kernels import memory
from distcomp.layout import Layout
from distcomp.methods.from_compressor import AllGatherMean, ReduceScatterMean
from distcomp.payload import Parts, Payload
from distcomp.randomness import Key

LAYOUT = Layout.of([("weight", (64, 64))])
SEEN: list[tuple[int, ...]] = []


@dataclass(frozen=True)
class Watched(Compressor):
    """Top-k that notes which places are decoded."""

    inner: Compressor = TopK(0.01)  # noqa: RUF009

    def parts(self, layout: Layout) -> Parts:
        return self.inner.parts(layout)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        return self.inner.encode(x, layout, key)

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        alone = memory.empty(layout.numel)
        self.inner.decode_into(alone, payload, layout)
        SEEN.append(tuple(alone.nonzero().flatten().tolist()))
        self.inner.decode_into(out, payload, layout, add)


def test_what_is_sparse_lies_elsewhere_on_every_rank() -> None:
    SEEN.clear()
    profiles_of(AllGatherMean(Watched()), [LAYOUT], 4)
    held = SEEN[-4 * (REPEATS + WARM_UP) :]
    for step in range(0, len(held), 4):
        assert len(set(held[step : step + 4])) == 4, "four ranks, four choices"
        assert held[step] == held[0], "this rank's own gradient is the same in each step"
        assert held[step + 1 : step + 4] == held[1:4]


def test_a_second_stage_and_a_rank_alone_are_profiled_as_well() -> None:
    (two_stages,) = profiles_of(ReduceScatterMean(Watched()), [LAYOUT], 3)
    (alone,) = profiles_of(AllGatherMean(Watched()), [LAYOUT], 1)
    assert len(two_stages.rounds) == 2
    assert len(alone.rounds) == 1
    assert torch.tensor([two_stages.work_s, alone.work_s]).isfinite().all()
