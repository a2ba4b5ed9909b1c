"""Models, with neighbours only: D-PSGD, DCD, ECD, CHOCO and DeepSqueeze, by name."""

from __future__ import annotations

from distcomp.averaging.base import Averaging
from distcomp.averaging.extrapolation import ECD
from distcomp.averaging.gossip import DCD, DPSGD, Choco, DeepSqueeze
from distcomp.averaging.topology import Topology
from distcomp.compressors import Compressor
from distcomp.compressors.fixed import GrowingGrid
from distcomp.methods import Method, compressor_of, register
from distcomp.schedule import Schedule, varying


@register(
    paper="Lian et al., Can decentralized algorithms outperform centralized algorithms?, NeurIPS 2017",
    wire="degree 4d / period",
    summable=False,
    biased=False,
    kind="gossip",
    limitations="long rings mix slowly, and data that differs between ranks keeps their models apart",
)
def dpsgd(
    topology: str | Topology = "ring",
    order: str = "combine_then_adapt",
    compressor: Compressor | Method | str = "identity",
    period: int | Schedule | str = 1,
    on_failure: str = "stop",
) -> Averaging:
    """Average models with one's neighbours and add the local update.

    ``topology``: ``ring``, ``torus``, ``hypercube``, ``exponential``, ``one_peer_exponential``, ``star``,
    ``complete``, ``random_regular``, or a Topology. ``order``: ``combine_then_adapt`` (the paper's) or
    ``adapt_then_combine``. With a ``compressor`` it is naive compressed gossip, which stalls at a floor: a
    control. ``period``: steps between exchanges. ``on_failure``: when a neighbour dies, ``stop`` or
    ``continue`` without it.
    """
    return DPSGD(compressor_of(compressor), topology, order, period=varying(period), on_failure=on_failure)


@register(
    paper="Tang et al., Communication compression for decentralized training, NeurIPS 2018: DCD-PSGD",
    wire="degree (d bits/8 + 4 d/block) / period",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="any optimizer makes the local update; warns where alpha on Gaussian data exceeds "
    "(1-rho)/(2 mu)",
    limitations="coarse compressors: their error must stay below a bound that the topology sets, or it "
    "diverges",
)
def dcd(
    compressor: Compressor | Method | str = "qsgd:bits=8",
    topology: str | Topology = "ring",
    period: int | Schedule | str = 1,
    on_failure: str = "stop",
) -> Averaging:
    """Send neighbours the compressed difference between the new model and the old.

    ``compressor``: of the difference, with a small relative error. ``topology`` as for ``dpsgd``, fixed.
    ``period``: steps between exchanges. ``on_failure``: when a neighbour dies, ``stop`` or ``continue``
    without it.
    """
    return DCD(compressor_of(compressor), topology, period=varying(period), on_failure=on_failure)


@register(
    paper="Tang et al., Communication compression for decentralized training, NeurIPS 2018: ECD-PSGD",
    wire="degree d (bits + log2 t)/8 / period",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="an absolute grid around the common start, with a spacing from the model, whose integers grow "
    "and which widens where values do not fit: relative quantizers diverge; the count starts at t = 2",
    limitations="relative quantizers diverge, and its integers grow with the step: prefer choco",
)
def ecd(
    spacing: float | None = None,
    bits: int = 8,
    topology: str | Topology = "ring",
    compressor: Compressor | Method | str | None = None,
    allow_relative: bool = False,
    period: int | Schedule | str = 1,
    on_failure: str = "stop",
) -> Averaging:
    """Send neighbours a compressed extrapolation of the model, whose noise averages out; prefer ``choco``.

    Values are multiples of ``spacing`` away from the model that all began with, in ``bits`` bits and one more
    with every doubling of the step; ``spacing=None`` takes a 1024th of a typical weight of each parameter.
    ``compressor`` replaces that grid; a relative one is refused unless ``allow_relative``. ``topology`` as
    for ``dpsgd``, fixed. ``period``: steps between exchanges. ``on_failure``: when a neighbour dies, ``stop``
    or ``continue`` without it.
    """
    grid = GrowingGrid(spacing, bits) if compressor is None else compressor_of(compressor)
    return ECD(grid, topology, allow_relative, period=varying(period), on_failure=on_failure)


@register(
    paper="Koloskova et al., Decentralized deep learning with arbitrary communication compression, ICLR 2020",
    wire="degree payload / period",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="public copies start from the common model and are kept one by one; a default step size; "
    "unbiased compressors are damped by 1/(1+omega), measured on Gaussian data (the authors' code: by the "
    "bound)",
    limitations="a gamma above what the compressor's error allows diverges; long rings mix slowly",
)
def choco(
    compressor: Compressor | Method | str = "qsgd:bits=4",
    topology: str | Topology = "ring",
    gamma: float | None = None,
    period: int | Schedule | str = 1,
    on_failure: str = "stop",
) -> Averaging:
    """Send neighbours what their copy of the model lacks, compressed, and move towards the copies of theirs.

    ``compressor``: any, ``"sign"`` for one bit per value and a scale per parameter. ``gamma``: the consensus
    step size; None takes a rule of thumb (0.4 delta + 0.6 delta^4). ``topology`` as for ``dpsgd``, fixed.
    ``period``: steps between exchanges. ``on_failure``: when a neighbour dies, ``stop`` or ``continue``
    without it.
    """
    return Choco(compressor_of(compressor), topology, gamma, period=varying(period), on_failure=on_failure)


@register(
    paper="Tang et al., DeepSqueeze: decentralization meets error-compensated compression, 2019",
    wire="degree payload / period",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="unbiased compressors are damped by 1/(1+omega), measured on Gaussian data; warns where eta "
    "exceeds their contraction",
    limitations="an eta above what the compressor's error allows diverges; whole models are harder to "
    "compress than differences",
)
def deepsqueeze(
    compressor: Compressor | Method | str = "qsgd:bits=4",
    topology: str | Topology = "ring",
    eta: float = 0.1,
    period: int | Schedule | str = 1,
    on_failure: str = "stop",
) -> Averaging:
    """Send neighbours the compressed model, with error feedback, and move towards theirs.

    ``eta``: the consensus step size, small because whole models are compressed. ``compressor`` and
    ``topology`` as for ``choco``; the topology may change. ``period``: steps between exchanges.
    ``on_failure``: when a neighbour dies, ``stop`` or ``continue`` without it.
    """
    return DeepSqueeze(
        compressor_of(compressor), topology, eta, period=varying(period), on_failure=on_failure
    )
