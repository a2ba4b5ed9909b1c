"""What pareto.py compares: a row per method, with the optimizer inside it and the settings that are tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._library_lm import Reader
from benchmarks.relatives import orthonormalized
from distcomp.attaching.weights import Weights
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.periodic import Mean
from distcomp.layout import Layout
from distcomp.methods import Method, parse, qsgd

BETAS, DECAY = (0.9, 0.95), 0.01
NEVER, ALONE, QUARTER = "one average at the end", "no communication", "DDP fp32, a quarter of the steps"
QUANTIZED = {
    f"model quantized ({period}, {bits})": partial(Mean, qsgd(bits=bits), period=period)
    for period, bits in ((1, 4), (10, 4))
}
"""PQASGD's control: the model in the place of what was learnt, every so many steps, in so many bits."""
NOTHING = partial(Mean, period=1 << 40)
UNNAMED: dict[str, Callable[[], Averaging]] = {NEVER: NOTHING, ALONE: NOTHING, **QUANTIZED}
"""What no text names, because nobody should use it."""


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, for workers whose models are the rows of one tensor.

    Source: Jordan et al., "Muon", 2024: Nesterov momentum 0.95, five steps of its quintic iteration. Scaled
    to the root mean square of AdamW's steps, ``0.2 sqrt(max(a, b))``, so that one learning rate serves both:
    Liu et al., "Muon is scalable for LLM training", 2025.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for rows in group["params"]:
                rows.mul_(1 - group["lr"] * DECAY)
                rows.sub_(self._direction(rows, self.state[rows]), alpha=group["lr"])

    def _direction(self, rows: Tensor, state: dict[str, Any]) -> Tensor:
        """AdamW's step everywhere, and Muon's in the place of it where a matrix is hidden."""
        grad, layout = rows.grad, _layout()
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            state.setdefault(name, torch.zeros_like(rows))
        state["step"] = step = state.get("step", 0) + 1
        first, second, momentum = state["exp_avg"], state["exp_avg_sq"], state["momentum_buffer"]
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad * grad, 1 - BETAS[1])
        momentum.lerp_(grad, 0.05)
        out = first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
        ahead = torch.lerp(grad, momentum, 0.95)
        for param, piece, to in zip(
            layout.slices, ahead.split(layout.sizes, 1), out.split(layout.sizes, 1), strict=True
        ):
            if param.name.startswith("blocks."):
                orthonormal = orthonormalized(piece.view(-1, *param.shape)).reshape(len(to), -1)
                to.copy_(0.2 * max(param.shape) ** 0.5 * orthonormal)
        return out


@cache
def _layout() -> Layout:
    return Weights(Reader()).layout


INNER: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "AdamW": lambda rows, rate: torch.optim.AdamW(rows, rate, BETAS, weight_decay=DECAY, fused=True),
    "Muon": Muon,
    "SGD": torch.optim.SGD,
}
"""Optimizers that workers step with. SGD is for methods whose estimate is a step already."""


MUON = " (Muon inside)"


@dataclass(frozen=True)
class Row:
    """A method, its family, and what is tried for it: learning rates from ``rate`` on, then ``settings``,
    which are added to the text."""

    spec: str
    family: str
    settings: tuple[str, ...] = ("",)
    inner: str = "AdamW"
    rate: float = 8e-3

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.spec}{MUON}" if self.inner == "Muon" else self.spec

    def text(self, setting: str) -> str:
        """The method with a setting, as ``parse`` reads it."""
        return self.spec + (":" if ":" not in self.spec else ",") * bool(setting) + setting

    def carrier(self, setting: str) -> Averaging | MultiLevel | Method:
        made: Averaging | MultiLevel | Method
        made = UNNAMED[self.spec]() if self.spec in UNNAMED else parse(self.text(setting))
        return made


CONTROL, EVERY_STEP, RARE, GOSSIP = "control", "every step", "rare", "gossip"
OUTER = ("outer_lr=0.8,outer_momentum=0.6", "outer_lr=0.7,outer_momentum=0.9")
"""Outer steps of DiLoCo and its like; the second is its paper's."""
SPARSE = ("outer_lr=1.0", "outer_lr=0.8,outer_momentum=0.6")
DECAYS = ("decay=0.999", "decay=0.99")

DDP = Row("identity", CONTROL)
ROWS: tuple[Row, ...] = (
    DDP,
    Row(NEVER, CONTROL),
    Row("muloco:period=7", RARE, OUTER, "Muon"),
    Row(ALONE, CONTROL),
    Row("identity", CONTROL, inner="Muon"),
    Row(NEVER, CONTROL, inner="Muon"),
    Row(ALONE, CONTROL, inner="Muon"),
    Row("diloco:period=50", RARE, OUTER),
    Row("diloco:period=50,compressor=qsgd:bits=1", RARE, OUTER),
    Row("muloco:period=72", RARE, OUTER, "Muon"),
    Row("demo:k=16,values=onebit", EVERY_STEP, DECAYS, "SGD", 2e-3),
    Row("sparse_loco:period=25", RARE, SPARSE),
    Row("qsgd:bits=4", EVERY_STEP),
    Row("topk:ratio=0.005,values=int4", EVERY_STEP),
    Row("diloco:period=200,compressor=qsgd:bits=4", RARE, OUTER),
    Row("local_sgd:period=50", RARE),
    Row("qsgd:bits=1", EVERY_STEP),
    Row("pqasgd:period=10,bits=4", RARE),
    *(Row(name, CONTROL) for name in QUANTIZED),
    Row("powersgd:rank=4", EVERY_STEP),
    Row("streaming_diloco:period=50", RARE, OUTER),
    Row("demo:k=32", EVERY_STEP, DECAYS, "SGD", 2e-3),
    Row("diloco:period=10", RARE, OUTER),
    Row("diloco:period=200", RARE, OUTER),
    Row("local_sgd:period=10", RARE),
    Row("local_sgd:period=200", RARE),
    Row("qsgd:bits=2", EVERY_STEP),
    Row("pqasgd:period=50,bits=2", RARE),
    Row("muloco:period=100", RARE, OUTER, "Muon"),
    Row("choco", GOSSIP),
    Row("diloco:period=10,compressor=qsgd:bits=1", RARE, OUTER, "Muon"),
    Row("sparse_loco:period=50", RARE, SPARSE),
    Row("des_loc:period=50", RARE),
    Row("noloco:period=50", GOSSIP),
    Row("pulseloco:period=50", RARE, OUTER),
    Row("dion:rank=4", EVERY_STEP, inner="SGD", rate=2e-2),
    Row("demo:k=32,values=onebit", EVERY_STEP, DECAYS, "SGD", 2e-3),
    Row("topk:ratio=0.01", EVERY_STEP),
    Row("qsgd:bits=8", EVERY_STEP),
)  # fmt: skip
"""In order of what they are worth to the questions: a study that is stopped has the first ones."""
SEVERAL_SEEDS = 9
"""So many of them have all their seeds before the others have one."""
TRAINED: tuple[str, ...] = (
    *(f"{name}{inner}" for name in (NEVER, ALONE) for inner in ("", MUON)), f"muloco:period=72{MUON}",
    "diloco:period=50", "sparse_loco:period=25", "diloco:period=50,compressor=qsgd:bits=1",
    "diloco:period=200,compressor=qsgd:bits=4", "local_sgd:period=50", "streaming_diloco:period=50",
    "pqasgd:period=50,bits=2", "sparse_loco:period=50", "diloco:period=200",
)  # fmt: skip
"""Those that also begin from a trained model."""
APART: tuple[str, ...] = (
    "identity", NEVER, ALONE, "local_sgd:period=10", "diloco:period=50", "choco", "local_sgd:period=50",
    "noloco:period=50", "des_loc:period=50", "sparse_loco:period=25",
)  # fmt: skip
"""Those that are also run where every worker has packages of its own."""
PAIRED, UNCORRECTED = (
    "noloco:period=50,outer_lr=1.0,gamma=1.0,outer_momentum=0",
    "noloco:period=50,gamma=0.001",
)
ONLY_APART: tuple[Row, ...] = (
    Row("dpsgd:compressor=(qsgd:bits=4)", GOSSIP),
    Row(PAIRED, GOSSIP),
    Row(UNCORRECTED, GOSSIP),
    Row("dpsgd", GOSSIP),
)
"""Those that are run there alone: methods without what their papers add to them."""
CORRECTIONS: tuple[tuple[str, str, str], ...] = (
    ("choco", "dpsgd:compressor=(qsgd:bits=4)", "differences to public copies in the place of models"),
    ("noloco:period=50", UNCORRECTED, "the term that pulls the slow weights of a pair together"),
    ("noloco:period=50", PAIRED, "the outer optimizer"),
    ("diloco:period=50", "local_sgd:period=50", "the outer optimizer"),
    ("des_loc:period=50", "local_sgd:period=50", "the average of Adam's moments"),
)
"""A method, the same without what corrects it, and what that is."""
