"""Should a mixture's experts live on ranks of their own, or be all-reduced? And by which codec?

Two ways to hold them are compared, for the model that was observed:

* *all here*: each rank has all experts, and their gradients are reduced with everything else by a method;
* *spread*: each rank has its share of them; rows of tokens travel there and back, forward and backward, while
  computing waits, and the rest of the model is reduced by the method.

What computes is the same in both, for on average a rank is given as many rows as it sends away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel

from distcomp.advice.predict import Machine, predict
from distcomp.advice.profile import clock
from distcomp.advice.scale import Rehearsals
from distcomp.advice.script import ObservedTwice
from distcomp.advice.task import TrainingTask
from distcomp.advice.waiting import waiting_step_s
from distcomp.attaching.observe import ObservedSteps, observe_alone
from distcomp.attaching.observe_waits import Wait, WaitingStep
from distcomp.calls.codec import codec_for
from distcomp.conditional.expert_traffic import MixtureShape, step_bytes, step_calls
from distcomp.conditional.experts import TENSORS, MixtureOfExperts
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host
from distcomp.randomness import Key

METHODS = ("ddp", "qsgd:bits=8")
"""By which gradients are reduced in the comparison, where nobody says."""
ROWS = ("identity", "bf16", "qsgd:bits=8", "mxfp8")
"""By which rows travel."""
SETTINGS = ("tokens", "width", "hidden", "experts", "k")


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in a model: how many tokens of a rank go through it in a step, and which
    parameters its experts are, by patterns of names (``moe.up``, ``*.experts.*``)."""

    parameters: tuple[str, ...]
    shape: MixtureShape
    reduced: bool = False
    """Whether these must be among what DistributedDataParallel reduces: so of one that somebody names. One
    that is seen may be spread over ranks already."""

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """``parameters=*.experts.*,tokens=256,width=128,hidden=256,experts=8,k=2``.

        Raises DistcompError for other settings, or one that is missing.
        """
        given = dict(part.strip().partition("=")[::2] for part in text.split(","))
        try:
            numbers = {name: int(given.pop(name)) for name in SETTINGS}
            patterns = (given.pop("parameters"),)
            if given or min(numbers.values()) < 1:
                raise ValueError(min(given, default="a number below 1"))
        except (KeyError, ValueError) as error:
            raise DistcompError(
                f"{text!r} describes no mixture ({error}); write parameters=*.experts.*,tokens=256,width=128,"
                "hidden=256,experts=8,k=2"
            ) from None
        return cls(patterns, MixtureShape(**numbers, ranks=2), reduced=True)

    def owns(self, param: ParamSlice) -> bool:
        """Whether a parameter is the experts'."""
        return any(fnmatchcase(param.name, pattern) for pattern in self.parameters)


@contextmanager
def mixtures_seen() -> Iterator[list[Mixture]]:
    """Until it ends, the mixtures of every model in DistributedDataParallel are noted as it trains, with the
    tokens of their last forward."""
    found: dict[str, Mixture] = {}
    seen: list[Mixture] = []

    def look(module: nn.Module, arguments: object, outputs: object) -> None:
        if not isinstance(module, DistributedDataParallel) or not module.training:
            return
        for prefix, part in module.module.named_modules():
            if isinstance(part, MixtureOfExperts) and part.routing.tokens:
                names = tuple(f"{prefix}.{name}".lstrip(".") for name in TENSORS)
                found[prefix] = Mixture(names, part.shape_of(part.routing.tokens))
        seen[:] = found.values()

    handle = register_module_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class MixtureRow:
    """``held``: "all here" or "spread"; ``rows``: the codec of rows where they are spread. ``method``:
    reduces gradients. Seconds of a step, bytes that a rank sends in one, and those of the experts among them:
    their gradients, or rows."""

    held: str
    method: str
    rows: str
    step_s: float
    sent_bytes: float
    experts_bytes: float


@dataclass(frozen=True)
class MixtureAdvice:
    """The ways to hold the experts, fastest first, and a sentence."""

    rows: tuple[MixtureRow, ...]
    mixtures: tuple[Mixture, ...]

    @property
    def sentence(self) -> str:
        """What is fastest, and up to how many tokens rows are fewer bytes than gradients."""
        best, shape = self.rows[0], self.mixtures[0].shape
        other = next((row for row in self.rows if row.held != best.held), None)
        if other is None:
            return (
                f"{shape.experts} experts do not divide among {shape.ranks} ranks: keep all of them on each "
                "rank, or take a number of ranks that divides them."
            )
        spread, here = (best, other) if best.held == "spread" else (other, best)
        even = shape.tokens * here.experts_bytes / spread.experts_bytes
        words = {"spread": "Spread the experts over the ranks", "all here": "Keep all experts on each rank"}
        about = f"rows by {best.rows}, " if best is spread else ""
        return (
            f"{words[best.held]} ({about}gradients by {best.method}): {1e3 * best.step_s:,.3g} ms a step, "
            f"against {1e3 * other.step_s:,.3g} ms. Uncompressed, rows are fewer bytes than the experts' "
            f"gradients while a rank has less than {shape.break_even_tokens():,.0f} tokens in a step; rows "
            f"by {spread.rows} against gradients by {here.method} while it has less than {even:,.0f}. It has "
            f"{shape.tokens:,}."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        mixtures = [{"parameters": one.parameters, **asdict(one.shape)} for one in self.mixtures]
        return {"sentence": self.sentence, "mixtures": mixtures, "ways": [asdict(row) for row in self.rows]}


def advise_experts(
    trained: TrainingTask | ObservedTwice,
    fabric: Fabric,
    mixtures: Sequence[Mixture] = (),
    methods: Sequence[str] = METHODS,
    host: Host = ALONE,
) -> MixtureAdvice | None:
    """Predict the step with all experts on each rank, and with experts spread over the ranks of ``fabric``.

    ``mixtures``: those of the model, where :func:`mixtures_seen` was not there to see them, or they are no
    :class:`~distcomp.conditional.MixtureOfExperts`. Gradients go by each of ``methods``, rows by
    :data:`ROWS`, whose encoding and decoding is timed here.

    Returns None for a model without a mixture. Raises DistcompError for an FSDP2 model, patterns that match
    no parameter.
    """
    if isinstance(trained, TrainingTask):
        with mixtures_seen() as seen:
            observed: Any = _observed(trained, fabric)
        mixtures = tuple(mixtures) or tuple(seen)
    else:
        observed = min(trained, key=lambda steps: steps.step_s)
    if not mixtures:
        return None
    if not isinstance(observed, ObservedSteps):
        raise DistcompError("experts in an FSDP2 model are not predicted; observe it with DDP")
    placed = tuple(replace(one, shape=replace(one.shape, ranks=fabric.ranks)) for one in mixtures)
    _check(placed, observed)
    rows = [
        row
        for method in methods
        for row in _rows(method, placed, Machine(observed, host, host.oversubscription), fabric)
    ]
    return MixtureAdvice(tuple(sorted(rows, key=lambda row: row.step_s)), placed)


def _observed(task: TrainingTask, fabric: Fabric) -> ObservedSteps:
    return observe_alone(task.model, task.batch(0, fabric.ranks, 0), task.loss, task.optimizer)


def _check(mixtures: Sequence[Mixture], observed: ObservedSteps) -> None:
    params = [param for layout in observed.layouts for param in layout.slices]
    for one in mixtures:
        if one.reduced and not any(map(one.owns, params)):
            raise DistcompError(
                f"no parameter is called {one.parameters[0]!r}; the model has "
                f"{', '.join(param.name for param in params[:6])}"
            )


def _rows(method: str, mixtures: Sequence[Mixture], machine: Machine, fabric: Fabric) -> Iterator[MixtureRow]:
    """A method with all experts on each rank, and with rows by each codec."""
    assert isinstance(machine.observed, ObservedSteps)
    here = predict(*_about(method, with_experts(machine.observed, mixtures), machine, fabric))
    rest = predict(*_about(method, without_experts(machine.observed, mixtures), machine, fabric))
    gradients = here.sent_bytes - rest.sent_bytes
    yield MixtureRow("all here", method, "", here.step_s, here.sent_bytes, gradients)
    if any(one.shape.experts % fabric.ranks for one in mixtures):
        return
    for codec in ROWS:
        coding_s = sum(coded_s(one.shape, codec) for one in mixtures) * machine.slowness
        waits = [Wait(ask) for one in mixtures for ask in step_calls(one.shape, codec)]
        step = WaitingStep(rest.step_s + coding_s, tuple(waits))
        rows = sum(step_bytes(one.shape, codec) for one in mixtures)
        step_s = waiting_step_s(step, fabric, machine.host)
        yield MixtureRow("spread", method, codec, step_s, rest.sent_bytes + rows, rows)


def _about(method: str, observed: ObservedSteps, machine: Machine, fabric: Fabric) -> Any:
    profiled = Rehearsals(method, observed.layouts).among(fabric.ranks)
    return profiled, replace(machine, observed=observed), fabric


def without_experts(observed: ObservedSteps, mixtures: Sequence[Mixture]) -> ObservedSteps:
    """The step, with what is not the experts' in its buckets."""
    kept = [
        (layout.select(lambda param: not any(one.owns(param) for one in mixtures)), ready_s)
        for layout, ready_s in zip(observed.layouts, observed.ready_s, strict=True)
    ]
    kept = [(layout, ready_s) for layout, ready_s in kept if layout.slices]
    return replace(
        observed, layouts=tuple(layout for layout, _ in kept), ready_s=tuple(ready_s for _, ready_s in kept)
    )


def with_experts(observed: ObservedSteps, mixtures: Sequence[Mixture]) -> ObservedSteps:
    """The step, with the experts in its buckets: where DistributedDataParallel was told to leave them alone,
    in one more, which is ready last."""
    held = [param for layout in observed.layouts for param in layout.slices]
    missing = [one for one in mixtures if not any(map(one.owns, held))]
    if not missing:
        return observed
    more = Layout.of(
        [
            (f"{one.parameters[0]}.{kind}", shape)
            for one in missing
            for kind, shape in (
                ("up", (one.shape.experts, one.shape.width, one.shape.hidden)),
                ("up_bias", (one.shape.experts, one.shape.hidden)),
                ("down", (one.shape.experts, one.shape.hidden, one.shape.width)),
                ("down_bias", (one.shape.experts, one.shape.width)),
            )
        ]
    )
    last_s = max(observed.ready_s, default=observed.step_s)
    return replace(observed, layouts=(*observed.layouts, more), ready_s=(*observed.ready_s, last_s))


def coded_s(shape: MixtureShape, codec: str, repeats: int = 3) -> float:
    """Seconds of a core to encode and decode the rows of a step, as they are timed here."""
    known = codec_for(codec, torch.float32)
    count = max(1, math.ceil(shape.row_values / 4 / shape.width))
    rows = torch.randn(count, shape.width, dtype=torch.float32)
    times_s = []
    for step in range(repeats + 1):
        begin_s = clock()
        known.decode(known.encode(rows, Key.of("rows", step)), (count, shape.width))
        times_s.append(clock() - begin_s)
    return 4 * statistics.median(times_s[1:])
