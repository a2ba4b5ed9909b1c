"""Predictions in the place of models or gradients, by name."""

from __future__ import annotations

from distcomp.averaging.base import Averaging
from distcomp.averaging.codistill import PREDICTIONS, Codistillation
from distcomp.averaging.topology import Topology
from distcomp.compressors import Compressor
from distcomp.methods import Method, compressor_of, register
from distcomp.schedule import Schedule, varying


@register(
    paper="Anil et al., Large scale distributed neural network training through online distillation, "
    "ICLR 2018",
    wire="degree (rows outputs bits/8) / period, whatever d is",
    summable=False,
    biased=False,
    kind="predictions",
    deviations="predictions of shared examples in the place of checkpoints, compressed; the paper's are "
    "exchanged=checkpoints, with the difference compressed and the term on shared examples",
    limitations="each worker ends with a network of its own, which saw its own labels alone: where the data "
    "of one worker does for the task, or none is shared, it gains nothing; each step computes a forward and "
    "a backward of batch rows more",
)
def codistill(
    period: int | Schedule | str = 50,
    values: Compressor | Method | str = "qsgd:bits=8",
    weight: float | Schedule | str = 1.0,
    temperature: float = 1.0,
    rows: int = 0,
    batch: int = 64,
    topology: str | Topology = "complete",
    term: str = "kl",
    exchanged: str = PREDICTIONS,
    on_failure: str = "stop",
) -> Averaging:
    """Exchange predictions of shared unlabelled examples every ``period`` steps, and agree with them.

    Give the examples, the same on every rank, to ``attach(..., shared=examples)``. ``values``: how
    predictions are compressed. ``weight`` of the agreement term, often a schedule that begins at 0;
    ``temperature`` T of its softmax. ``rows``: so many of the examples in an exchange, drawn anew; 0: all.
    ``batch``: of them in each step. ``topology``: with whom, as for ``dpsgd``. ``term``: ``kl``, or ``mse``
    for networks that predict numbers. ``exchanged``: ``predictions``, or ``checkpoints``, the paper's.
    ``on_failure``: when a neighbour dies, ``stop`` or ``continue`` without it.
    """
    return Codistillation(
        compressor_of(values),
        topology,
        varying(weight),
        temperature,
        rows,
        batch,
        term,
        exchanged,
        period=varying(period),
        on_failure=on_failure,
    )
