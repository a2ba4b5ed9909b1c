"""Models, rarely: local SGD, sparse parameter averaging, PQASGD, DiLoCo and its relatives, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.outer import Outer
from distcomp.averaging.periodic import Mean, Periodic
from distcomp.compressors import Compressor, Identity, TopK, parse_compressor
from distcomp.compressors.topk import with_values
from distcomp.errors import DistcompError
from distcomp.grammar import split_call
from distcomp.methods import (
    ErrorFeedback,
    Method,
    from_compressor,
    method_of,
    parse,
    qsgd,
    register,
    with_feedback,
)
from distcomp.registry import COMPRESSORS, METHODS
from distcomp.schedule import Schedule, varying


@register(
    paper="Stich, Local SGD converges fast and communicates little, ICLR 2019",
    wire="2 (n-1)/n 4d / period",
    summable=True,
    biased=False,
    kind="periodic",
    deviations="what becomes of the optimizer's state and of BatchNorm's buffers is a choice",
    limitations="long periods on data that differs between ranks pull the models apart, and the mean of "
    "far models is a bad one",
)
def local_sgd(
    period: int | Schedule | str = 8,
    optimizer_state: str = "keep",
    buffers: str = "average",
    on_failure: str = "stop",
) -> Averaging:
    """Train alone for ``period`` steps, then average the models.

    ``optimizer_state`` at an exchange: ``keep``, ``reset`` or ``average`` it. ``buffers`` (BatchNorm):
    ``average`` or ``keep``. ``on_failure``: when a worker dies or is late, ``stop``, or ``continue`` without
    it, with settings of ``distcomp.averaging.lateness.Lateness``: ``continue:quorum=3,grace_s=30``.
    """
    return Periodic(
        period=varying(period), optimizer_state=optimizer_state, buffers=buffers, on_failure=on_failure
    )


@register(
    paper="Jiang & Agrawal, A linear speedup analysis of distributed deep learning with sparse and quantized "
    "communication, NeurIPS 2018: sparse parameter averaging",
    wire="2 (n-1)/n 4d / period",
    summable=True,
    biased=False,
    kind="periodic",
    deviations="nowhere that is known; the paper's listing of the sparse schedule was not obtainable",
    limitations="long periods on data that differs between ranks pull the models apart, and the mean of "
    "far models is a bad one",
)
def sparse_averaging(
    period: int | Schedule | str = 8,
    schedule: str = "periodic",
    optimizer_state: str = "keep",
    buffers: str = "average",
) -> Averaging:
    """Average each coordinate of the models once every ``period`` steps.

    ``schedule="periodic"``: all at once. ``"round_robin"``: a slice of 1/period of them in every step, which
    sends as much. ``optimizer_state``: ``keep``, ``reset`` or ``average`` it at an exchange; ``buffers``:
    ``average`` or ``keep`` them.
    """
    return _scheduled(
        Periodic(period=varying(period), optimizer_state=optimizer_state, buffers=buffers), schedule
    )


@register(
    paper="Jiang & Agrawal, A linear speedup analysis of distributed deep learning with sparse and quantized "
    "communication, NeurIPS 2018: PQASGD",
    wire="(n-1)/n (d (bits + bits2)/8 + 8 d/block) / period, bits2 >= bits those of the mean",
    summable=False,
    biased=False,
    kind="periodic",
    deviations="scatter-reduce from three ranks on (a second quantization, of more bits as qsgd has it); "
    "error feedback is an extension, off by default; biases and norms in float32",
    limitations="few bits and long periods at a large learning rate: what is rounded is the whole way "
    "since the last exchange",
)
def pqasgd(
    period: int | Schedule | str = 8,
    bits: int | Schedule = 4,
    block: int = 512,
    schedule: str = "periodic",
    pattern: str = "auto",
    error_feedback: bool | None = None,
    optimizer_state: str = "keep",
    buffers: str = "average",
    on_failure: str = "stop",
) -> Averaging:
    """Train alone for ``period`` steps, then average what was learnt, quantized so that the mean is right.

    ``bits`` per value in blocks of ``block``, as ``qsgd`` has them; the data sent is ``bits/32/period`` of
    float32's: 3.1 % at (2,2), (4,4) and (8,8). ``schedule``: ``periodic``, or ``round_robin`` (a slice of
    1/period in every step). ``pattern`` forces ``all_gather`` or ``reduce_scatter``. ``error_feedback=None``
    adds it only at one bit, which is biased. ``optimizer_state``: ``keep``, ``reset`` or ``average`` it at an
    exchange; ``buffers``: ``average`` or ``keep`` them. ``on_failure`` as for ``local_sgd``.
    """
    settings: dict[str, Any] = {
        "bits": bits,
        "block": block,
        "pattern": pattern,
        "error_feedback": error_feedback,
    }
    method = qsgd(**settings)
    averaging = Periodic(
        method,
        period=varying(period),
        optimizer_state=optimizer_state,
        buffers=buffers,
        on_failure=on_failure,
    )
    return _scheduled(averaging, schedule)


@register(
    paper="Lin et al., Don't use large mini-batches, use local SGD, ICLR 2020",
    wire="2 (n-1)/n 4d, later / period",
    summable=True,
    biased=False,
    kind="periodic",
    deviations="the switch is a step, not the first decay of the learning rate; BatchNorm's buffers are "
    "averaged when models are; PyTorch's PeriodicModelAverager averages at after + 1 already",
    limitations="switched too early, it is local_sgd; its savings begin after the switch only",
)
def post_local_sgd(
    period: int = 16, after: int = 1000, optimizer_state: str = "keep", buffers: str = "average"
) -> Averaging:
    """Average the gradients in every step up to step ``after``, then the models every ``period`` steps.

    With ``after=20, period=5`` gradients are averaged in steps 1 to 20 and models after steps 25, 30 and so
    on. It needs a DistributedDataParallel model. ``optimizer_state``: ``keep``, ``reset`` or ``average`` it
    at an exchange of models; ``buffers``: ``average`` or ``keep`` them.
    """
    return Periodic(period=period, optimizer_state=optimizer_state, buffers=buffers, gradients_until=after)


@register(
    paper="Douillard et al., DiLoCo, 2023",
    wire="2 (n-1)/n 4d / period, or the compressor's",
    summable=False,
    biased=False,
    kind="periodic",
    deviations="any compressor for the outer gradient",
    limitations="in short runs, which see few outer steps; an outer learning rate that suits one period "
    "does not suit another",
)
def diloco(
    period: int | Schedule | str = 500,
    compressor: Method | Compressor | str = "identity",
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    optimizer_state: str = "keep",
    buffers: str = "average",
    on_failure: str = "stop",
) -> Averaging:
    """Train alone for ``period`` steps, then step an outer optimizer with the mean of what was learnt.

    ``outer_lr``, ``outer_momentum`` and ``nesterov`` are the outer optimizer's; the inner one (AdamW in the
    paper) is yours. ``compressor``: what the outer gradient goes through. ``optimizer_state``: ``keep`` (the
    paper's), ``reset`` or ``average`` the inner one's; ``buffers``: ``average`` or ``keep`` them.
    ``on_failure``: when a worker dies or is late, ``stop``, or ``continue`` without it, with settings of
    ``distcomp.averaging.lateness.Lateness``: ``continue:quorum=3,grace_s=30``.
    """
    return Periodic(
        sent_through(compressor),
        Outer(outer_lr, outer_momentum, nesterov),
        period=varying(period),
        optimizer_state=optimizer_state,
        buffers=buffers,
        on_failure=on_failure,
    )


@register(
    paper="Douillard et al., Streaming DiLoCo with overlapping communication, 2025",
    wire="the compressor's, for d/fragments values at a time, in all / period",
    summable=False,
    biased=False,
    kind="periodic",
    deviations="4-bit integers for the paper's 4-bit floats; fragments are parameters dealt out in turn",
    limitations="a long overlap applies what is agreed to a model that has moved on",
)
def streaming_diloco(
    period: int | Schedule | str = 100,
    fragments: int = 4,
    overlap: int = 1,
    alpha: float = 0.5,
    compressor: Method | Compressor | str = "qsgd:bits=4",
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    buffers: str = "average",
    on_failure: str = "stop",
) -> Averaging:
    """DiLoCo with the model in ``fragments`` that alternate, exchanged while training goes on.

    Each fragment is due every ``period`` steps. Its exchange may take ``overlap`` steps of computing;
    then the worker keeps ``alpha`` of its own weights and takes ``1 - alpha`` of what was agreed.
    ``compressor``, ``outer_lr``, ``outer_momentum``, ``nesterov``, ``on_failure`` as for ``diloco``;
    ``buffers``: ``average`` them with the first fragment, or ``keep`` them.
    """
    return Periodic(
        sent_through(compressor),
        Outer(outer_lr, outer_momentum, nesterov),
        fragments,
        "parameters",
        overlap,
        alpha,
        buffers=buffers,
        period=varying(period),
        on_failure=on_failure,
    )


@register(
    paper="Sarfi et al., Communication efficient LLM pre-training with SparseLoCo, 2025",
    wire="(n-1) k (1/4 + (2 + log2(d/k))/8) / period, k = ratio d",
    summable=False,
    biased=True,
    kind="periodic",
    deviations="the mean is over all workers, not those that sent a coordinate; 2-bit levels as qsgd has "
    "them",
    limitations="in short runs: what is owed at the end never arrives",
)
def sparse_loco(
    period: int | Schedule | str = 30,
    ratio: float = 1 / 64,
    chunk: int = 4096,
    values: str | Compressor = "int2",
    decay: float = 0.95,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    optimizer_state: str = "keep",
    buffers: str = "average",
    on_failure: str = "stop",
) -> Averaging:
    """DiLoCo, every ``period`` steps, with a sparse, coarse outer gradient: ``e = decay e + Delta - sent``.

    The largest ``ratio`` of each ``chunk`` is sent, its values as ``values`` (see ``topk``). ``decay`` lets
    old residuals fade. ``outer_lr`` and ``outer_momentum`` are the outer SGD's. ``optimizer_state``:
    ``keep``, ``reset`` or ``average`` it at an exchange; ``buffers``: ``average`` or ``keep`` them.
    ``on_failure`` as for ``diloco``.
    """
    # Gathered: ranks choose other elements each, and what an owner selected again would not be theirs.
    sparse = with_values(TopK(ratio, chunk), values)
    return Periodic(
        ErrorFeedback(from_compressor(sparse, "all_gather"), decay),
        Outer(outer_lr, outer_momentum),
        period=varying(period),
        optimizer_state=optimizer_state,
        buffers=buffers,
        on_failure=on_failure,
    )


@register(
    paper="Beton et al., SPARTA: sparse parameter averaging for reduced-communication training, 2025",
    wire="2 (n-1)/n 4 share d / period",
    summable=True,
    biased=False,
    kind="periodic",
    deviations="the same number of coordinates of each parameter in every exchange, instead of a coin for "
    "each",
    limitations="at small shares replicas drift apart between the steps in which a coordinate is averaged",
)
def sparta(share: float = 0.005, period: int | Schedule | str = 1) -> Averaging:
    """Every ``period`` steps average a random ``share`` of the coordinates, alike on all ranks."""
    return Mean(share=share, period=varying(period))


@register(
    paper="Lin et al., Don't use large mini-batches, use local SGD, ICLR 2020: hierarchical local SGD",
    wire="2 (g-1)/g 4d / period inside a group of g = ranks_per_group, and what ``across`` sends",
    summable=False,
    biased=False,
    kind="periodic",
    deviations="any averaging across groups",
    limitations="where groups see different data, or the network inside a group is no faster than that "
    "between them",
)
def multi_level(
    across: Averaging | str = "local_sgd:period=64",
    period: int | Schedule | str = 8,
    ranks_per_group: int = 2,
) -> MultiLevel:
    """Average inside groups often and across all workers rarely.

    Consecutive ranks, ``ranks_per_group`` of them, average their models every ``period`` steps in float32.
    ``across`` is the averaging of all ranks, or its text (in brackets where it holds commas).
    """
    if isinstance(across, str):
        across = parse(across)
    if not isinstance(across, Averaging):
        raise DistcompError(f"{across!r} averages no models; give one such as 'diloco:period=500'")
    return MultiLevel((Mean(ranks_per_group=ranks_per_group, period=varying(period)), across))


def sent_through(given: Method | Compressor | str) -> Method:
    """The method as given, or that of a compressor (with error feedback where it is biased)."""
    if isinstance(given, str):
        name, _ = split_call(given, "method")
        given = parse_compressor(given) if name not in METHODS and name in COMPRESSORS else method_of(given)
    if isinstance(given, Identity):
        return from_compressor(given)
    return with_feedback(given) if isinstance(given, Compressor) else method_of(given)


def _scheduled(averaging: Periodic, schedule: str) -> Periodic:
    """All coordinates at once, or a slice of them in every step."""
    if schedule == "periodic":
        return averaging
    if schedule != "round_robin" or not isinstance(averaging.period, int):
        raise DistcompError(
            "schedule is 'periodic', or 'round_robin' with a fixed period; "
            f"not {schedule!r} with {averaging.period}"
        )
    # As many fragments as the period has steps, which take turns: one of them is due in every step.
    return replace(averaging, fragments=averaging.period)
