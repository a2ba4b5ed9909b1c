"""Codistillation: workers exchange what they predict of examples that all have, and nothing of their models.

Every worker trains a network of its own on data of its own. Every ``period`` steps it tells its neighbours
what it predicts of shared examples, which need no labels; until the next time its loss has a term that pulls
its predictions of them towards what the neighbours said. Bytes do not depend on the number of parameters, nor
need the networks be alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import AveragingContext, agreed
from distcomp.averaging.gossip import Gossip, buffers, copies, tensors
from distcomp.averaging.topology import Topology, resolve
from distcomp.collectives import Rounds
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, PerParameter, State
from distcomp.randomness import Key
from distcomp.schedule import Varying, at, extremes

PREDICTIONS = "predictions"
"""The name under which they are exchanged and saved."""
EXCHANGED = (PREDICTIONS, "checkpoints")
TERMS = ("kl", "mse")


@dataclass(frozen=True)
class Codistillation(Gossip):
    """Exchange predictions of shared examples, and agree with those of others until the next time.

    ::

        every period steps:    send C(f_i(S)), S: the shared examples, or ``rows`` of them drawn anew
                               p_i = mean over neighbours j of softmax(f_j(S) / T)
        in every step:         loss_i + weight T^2 KL(p_i[B] | softmax(f_i(S[B]) / T)),  B: ``batch`` of S

    ``term="mse"``: ``1/2 mean((f_i - mean_j f_j)^2)`` for networks that predict numbers. Logits are centred
    before they are sent: a softmax does not see the difference, a quantizer does. A neighbour that is lost
    is left out; what it said last counts until the next exchange.

    ``exchanged="checkpoints"``: what is sent is the model (``C`` of the difference to what was sent last, as
    in CHOCO), and the neighbours' predictions are computed here, from stale copies: the control, whose bytes
    and memory grow with the model.

    Source: Anil et al., Large scale distributed neural network training through online distillation, ICLR
    2018, which exchanges checkpoints. We differ: predictions in their place, compressed, on shared examples
    in the place of each worker's own batch.

    Bytes: degree x payload of ``rows x outputs`` values every ``period`` steps; of d values for checkpoints.
    Memory: as many values; one model per neighbour and one of its own for checkpoints.

    Raises DistcompError for settings outside their ranges.
    """

    topology: str | Topology = "complete"
    weight: Varying = 1.0
    temperature: float = 1.0
    rows: int = 0
    batch: int = 64
    term: str = "kl"
    exchanged: str = PREDICTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.term not in TERMS or self.exchanged not in EXCHANGED:
            raise DistcompError(
                f"codistill's term is {' or '.join(TERMS)} and it exchanges {' or '.join(EXCHANGED)}, not "
                f"{self.term!r} and {self.exchanged!r}"
            )
        if extremes(self.weight)[0] < 0 or self.temperature <= 0 or self.rows < 0 or self.batch < 1:
            raise DistcompError(
                "codistill takes a weight of 0 or more, a temperature above 0, rows of 0 (all) or more and a "
                f"batch of 1 or more, not {self.weight}, {self.temperature}, {self.rows} and {self.batch}"
            )

    @property
    def replicas(self) -> bool:  # type: ignore[override]
        return self.exchanged == "checkpoints"

    @property
    def own_models(self) -> bool:
        """Whether networks may differ between workers."""
        return not self.replicas

    @property
    def starts_anew(self) -> bool:
        return False

    def init(self, x: Tensor, context: AveragingContext) -> State:
        """``x``: predictions or the model, whose values count for nothing yet."""
        heard = PerParameter({context.layout.names[0]: torch.zeros(1, dtype=torch.float32)})
        if not self.replicas:
            return {"targets": FlatBuffer(torch.zeros_like(x), context.layout), "heard": heard}
        zero = torch.zeros_like(x)
        public = FlatBuffer(zero, context.layout)
        return {
            "public": public,
            "replicas": copies(zero, self.row(context), context.layout),
            "heard": heard,
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        if self.replicas:
            return (yield from self._checkpoints(x, state, context))
        _, messages = yield from self.send(self.encode(x, context), context)
        if not messages:  # everybody is lost: what they said last stays
            return agreed(state["targets"].data, state)
        said = [self.compressor.decode(payload, context.layout) for _, payload in sorted(messages.items())]
        targets = self.targets(said, context.layout)
        heard = PerParameter(
            {context.layout.names[0]: torch.full((1,), float(len(said)), dtype=torch.float32)}
        )
        return agreed(targets, {"targets": FlatBuffer(targets, context.layout), "heard": heard})

    def _checkpoints(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        public, replicas = state["public"].data, tensors(state["replicas"])
        sent = self.encode(x - public, context)
        _, messages = yield from self.send(sent, context)
        public = self.advance(public, sent, context.layout)
        for j, payload in messages.items():
            replicas[j] = self.advance(replicas[j], payload, context.layout)
        heard = PerParameter(
            {context.layout.names[0]: torch.full((1,), float(len(messages)), dtype=torch.float32)}
        )
        changed = {
            "public": FlatBuffer(public, context.layout),
            "replicas": buffers(replicas, context.layout),
            "heard": heard,
        }
        return agreed(x, changed)

    def targets(self, said: Sequence[Tensor], layout: Layout) -> Tensor:
        """What to agree with, from what each neighbour predicts: probabilities, or numbers; flat."""
        if self.term == "mse":
            return torch.stack(list(said)).mean(0)
        return torch.stack([self._softened(z, layout) for z in said]).mean(0)

    def _softened(self, z: Tensor, layout: Layout) -> Tensor:
        """The softmax over the last side of each tensor in a flat buffer of logits."""
        scaled = z / self.temperature
        rows = (piece.view(-1, slice_.shape[-1]) for slice_, piece in layout.pieces(scaled))
        return torch.cat([each.softmax(-1).view(-1) for each in rows])

    def prepared(self, outputs: Tensor) -> Tensor:
        """Outputs as they are sent."""
        from distcomp.distill.losses import centred  # the room of distillation is for those who use it

        return (centred(outputs) if self.term == "kl" else outputs).reshape(-1)

    def disagreement(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The term without its weight, for outputs ``[rows, ..., classes]`` and targets of as many values."""
        targets = targets.view(outputs.shape)
        from distcomp.distill.losses import mimic_error, softened_kl

        if self.term == "mse":
            return mimic_error(outputs, targets)
        return softened_kl(outputs, targets, self.temperature)

    def weight_at(self, step: int) -> float:
        """The term's weight in a step."""
        return at(self.weight, step)

    def exchanged_rows(self, count: int, step: int, seed: int) -> Tensor:
        """Which of ``count`` shared examples an exchange after ``step`` is about: alike on all ranks."""
        if self.rows in (0, count):
            return torch.arange(count)
        generator = Key.of(seed, step).fold("shared rows").generator()
        return torch.randperm(count, generator=generator)[: self.rows]

    def batch_rows(self, count: int, step: int, seed: int, rank: int) -> Tensor:
        """Which of ``count`` exchanged examples a rank looks at in a step."""
        if count <= self.batch:
            return torch.arange(count)
        generator = Key.of(seed, step).fold("agreement", rank).generator()
        return torch.randperm(count, generator=generator)[: self.batch]

    def check_rows(self, count: int) -> int:
        """How many examples an exchange is about. Raises DistcompError for more than there are."""
        if count < 1 or self.rows > count:
            raise DistcompError(
                f"codistill exchanges predictions of {self.rows or 'all'} rows, and {count} examples are "
                "shared; share more, or ask for fewer rows"
            )
        return self.rows or count

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        if self.topology == "complete" or size == 1:  # no matrix of eigenvalues for what is no mixing
            degree = size - 1
        else:
            if self.replicas and resolve(self.topology, size).changes:
                raise DistcompError(
                    "codistill that exchanges checkpoints keeps copies of its neighbours' models, and those "
                    f"of {self.topology} change; use a fixed topology, or exchanged='predictions'"
                )
            degree = len(self.row(AveragingContext(0, size, layout, 0, Key.of(0))).neighbours)
        return {"degree": degree}


def predictions_layout(rows: int, outputs: Tensor) -> Layout:
    """Of what is exchanged about ``rows`` examples. ``outputs``: of one of them, ``[1, ..., classes]``.

    Raises DistcompError for outputs that are no rows of numbers.
    """
    if outputs.dim() < 2 or not outputs.is_floating_point():
        raise DistcompError(
            f"codistill exchanges outputs [rows, ..., classes], and the model gives {tuple(outputs.shape)} "
            f"of {outputs.dtype} for one row; let it return such"
        )
    classes = outputs.shape[-1]
    return Layout.of([(PREDICTIONS, (rows * (outputs[0].numel() // classes), classes))])


def examples_digest(examples: Tensor) -> str:
    """Names shared examples: all ranks must hold the same, in the same order."""
    plain = examples.detach().to("cpu").contiguous()
    digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return f"{tuple(examples.shape)} of {examples.dtype}, digest {digest}"
