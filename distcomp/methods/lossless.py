"""A lossless stage behind any method: payloads become shorter where their bytes are not equally frequent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllToAll, Request, Rounds, zeros
from distcomp.collectives.base import SealFor
from distcomp.errors import DistcompError
from distcomp.kernels import entropy as coding
from distcomp.kernels.entropy import CODERS, LONGEST_PERIOD, most_bytes
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import qsgd
from distcomp.methods.registry import method_of, register
from distcomp.payload import Part, Parts, Payload, body_bytes, wire_bytes
from distcomp.randomness import Key

SIZE = (Part("sizes", torch.int64, 1),)
"""What is said before: how many bytes will follow."""

MOST_PERIODS = 8
"""Of rows, between which a coder chooses; trying one takes as long as coding."""

SMALL_BYTES = 1024
"""Of payloads all of which are shorter, saying the sizes first costs more than coding them can save."""


@dataclass(frozen=True)
class Lossless(Method):
    """What ``inner`` says, in fewer bytes: every payload is coded without loss, and arrives bit for bit::

        s_i = |encode(payload_i)|, exchanged first;    then encode(payload_i), of s_i bytes;    decode(...)

    Estimate, contribution and state are ``inner``'s, bit for bit. ``entropy``: ``ans``, a coder in C
    with up to four tables for each 512 KiB of a payload, between which the columns and rows of weight
    matrices are divided (:mod:`distcomp.kernels.entropy`), or ``zstd`` (Zstandard, level 1, an extra). Only
    what is gathered, or sent from each to each, in payloads of 1 KiB and more is coded; sums on the wire and
    short payloads go as they are. ``x``: float32 ``[layout.numel]``.

    On the wire: of each coded exchange the coded payloads, each with a header and a checksum as any other,
    and 40 bytes to each rank for the sizes; a payload that does not become shorter is 4 bytes in 512 KiB
    longer. :meth:`payload_bytes` is the most that can be, not what is sent, which depends on the data. Each
    coded exchange waits for one more latency.

    Source: Duda, "Asymmetric numeral systems", 2013; for gradients' codes: Alistarh et al., "QSGD", NeurIPS
    2017 (Elias codes). We differ: frequencies are measured, of bytes that
    hold several codes.

    Raises DistcompError for an unknown coder, and, when it begins, for one that is not installed.
    """

    inner: Method
    entropy: str = "ans"

    bytes_are_bound = True

    def __post_init__(self) -> None:
        if self.entropy not in CODERS:
            raise DistcompError(f"payloads are coded by {' or '.join(CODERS)}, not {self.entropy!r}")

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.inner.propagates_nonfinite

    def init(self, layout: Layout) -> State:
        return self.inner.init(layout)

    def assumed_state(self, layout: Layout, step: int) -> State:
        return self.inner.assumed_state(layout, step)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        rounds = self.inner.aggregate(x, state, context)
        try:
            request = next(rounds)
            while True:
                answer = yield from self._carried(request, context)
                request = rounds.send(answer)
        except StopIteration as stop:
            result: AggregateResult = stop.value
            return result

    def _carried(self, request: Request, context: StepContext) -> Rounds[Any]:
        """The answer to one of inner's requests."""
        if not is_coded(request, context.rank, context.size):
            return (yield request)
        assert isinstance(request, AllGather | AllToAll)
        expected = tuple(request.expected(context.rank, context.size))
        periods = partial(row_periods, context.layout, context.size)

        def said_of(parts: Parts) -> Payload:
            """What a rank sends whose payload is of zeros."""
            return self._coded(zeros(parts), periods)

        coded = tuple(self._coded(payload, periods) for payload in request.sends())
        said = tuple(_size_of(payload) for payload in coded)
        sizes: list[Payload] = yield _with(
            request, said, None, expected, lambda parts: _size_of(said_of(parts))
        )
        lengths = [int(payload["sizes"]) for payload in sizes]
        parts = tuple(coded_parts(checked_size(n, plain)) for n, plain in zip(lengths, expected, strict=True))
        received: list[Payload] = yield _with(request, coded, parts, expected, said_of)
        return request.read(
            [self._decoded(payload, parts) for payload, parts in zip(received, expected, strict=True)]
        )

    def _coded(self, payload: Payload, periods: Callable[[int], tuple[int, ...]]) -> Payload:
        # Part by part: scales, which hardly become shorter, would blur the frequencies of codes.
        # Of numbers of several bytes the first are random and the last hardly differ: each its own columns.
        streams = [
            coding.encode(piece, self.entropy, (part.dtype.itemsize, *periods(piece.numel())))
            for piece, part in zip(_pieces(payload.body.cpu(), payload.parts), payload.parts, strict=True)
        ]
        lengths = torch.tensor([stream.numel() for stream in streams], dtype=torch.int32)
        stream = torch.cat([lengths.view(torch.uint8), *streams])
        return _payload(coded_parts(stream.numel()), stream, payload.wire.device)

    def _decoded(self, coded: Payload, parts: Parts) -> Payload:
        stream, count = coded["coded"].cpu(), len(parts)
        lengths = (
            stream[: 4 * count].clone().view(torch.int32).tolist() if stream.numel() >= 4 * count else []
        )
        if min(lengths, default=0) < 0 or 4 * count + sum(lengths) != stream.numel():
            raise DistcompError(
                f"a coded payload of {stream.numel()} bytes does not hold {count} parts of {lengths}; attach "
                "all ranks with one version and one coder"
            )
        streams = torch.split(stream[4 * count :], lengths) if count else ()
        payload = Payload.empty(parts, coded.wire.device)
        for piece, part, one in zip(_pieces(payload.body, parts), parts, streams, strict=True):
            piece.copy_(coding.decode(one.contiguous(), part.nbytes, self.entropy))
        return payload

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """The most: nothing becomes shorter."""
        return layout.remember((self, "bytes", size, step), lambda: self._most_bytes(layout, size, step))

    def _most_bytes(self, layout: Layout, size: int, step: int) -> int:
        """Of an exchange of zeros with ranks that say the same: what is asked depends on the layout alone."""
        context = StepContext(0, size, layout, step, Key.of("lossless"))
        nothing, state = torch.zeros(layout.numel, dtype=torch.float32), self.assumed_state(layout, step)
        rounds, longer = self.inner.aggregate(nothing, state, context), 0.0
        try:
            request = next(rounds)
            while True:
                longer += _longer_by(request, size) if is_coded(request, 0, size) else 0.0
                request = rounds.send(request.made_up(0, size))
        except StopIteration:
            pass
        return self.inner.payload_bytes(layout, size, step) + round(longer)


def row_periods(layout: Layout, shares: int, nbytes: int) -> tuple[int, ...]:
    """After how many bytes the rows of the layout's matrices may repeat among ``nbytes`` of codes, which are
    of all of its values or of one of so many shares of it; the rows that most values are in first."""
    return layout.remember((row_periods, shares, nbytes), lambda: _row_periods(layout, shares, nbytes))


def _row_periods(layout: Layout, shares: int, nbytes: int) -> tuple[int, ...]:
    values: Counter[int] = Counter()
    for one in layout.slices:
        if len(one.shape) >= 2 and one.numel:
            values[one.numel // one.shape[0]] += one.numel
    found: dict[int, None] = {}
    for width, _ in values.most_common():
        for share in {1, shares}:
            bits = 8 * nbytes * share / layout.numel
            whole = round(bits)
            if 1 <= whole <= 8 and abs(bits - whole) < 0.05 * whole and width * whole % 8 == 0:
                found[width * whole // 8] = None
    return tuple(period for period in found if 1 < period <= LONGEST_PERIOD)[:MOST_PERIODS]


def is_coded(request: Request, rank: int, size: int) -> bool:
    """Whether a request's payloads are coded: decided from what all ranks know of it."""
    if not isinstance(request, AllGather | AllToAll):
        return False
    if isinstance(request, AllToAll) and request.parts is not None:
        return True  # declared for each pair of ranks: no rank knows those of all
    lengths = (
        [body_bytes(payload.parts) for payload in request.payloads]
        if isinstance(request, AllToAll)
        else [body_bytes(parts) for parts in request.expected(rank, size)]
    )
    return max(lengths, default=0) >= SMALL_BYTES


def coded_parts(numel: int) -> Parts:
    """A payload of so many coded bytes."""
    return (Part("coded", torch.uint8, numel),)


def _pieces(body: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """The bytes of each part."""
    return torch.split(body, [part.nbytes for part in parts]) if parts else ()


def _payload(parts: Parts, values: Tensor, device: torch.device) -> Payload:
    payload = Payload.empty(parts, device)
    payload[parts[0].kind].copy_(values)
    return payload


def _size_of(coded: Payload) -> Payload:
    """What is said before it is sent."""
    return _payload(SIZE, torch.tensor([coded.body.numel()], dtype=torch.int64), coded.wire.device)


def checked_size(nbytes: int, plain: Parts) -> int:
    """A size that was said, if a payload of these parts can have it once it is coded."""
    most = sum(4 + most_bytes(part.nbytes) for part in plain)
    if not 0 <= nbytes <= most:
        raise DistcompError(
            f"a rank says that its coded payload has {nbytes} bytes, where {most} are the most; attach all "
            "ranks with one version and one coder"
        )
    return nbytes


Said = Callable[[Parts], Payload]
"""What a rank would send whose payload had these parts."""


@dataclass(frozen=True, eq=False)
class CodedAllGather(AllGather):
    """An all-gather of coded payloads, which were of the parts ``plain``, or of their sizes. Only where
    nobody else is asked does it differ: what others would send must then be readable, too."""

    plain: tuple[Parts, ...] = ()
    said: Said | None = None

    @property
    def leads(self) -> bool:
        return _says_sizes(self)

    def echo(self, rank: int, size: int, write_header: SealFor) -> list[Tensor]:
        return _echo(self, rank, size, write_header)


@dataclass(frozen=True, eq=False)
class CodedAllToAll(AllToAll):
    """As :class:`CodedAllGather`, from each to each."""

    plain: tuple[Parts, ...] = ()
    said: Said | None = None

    @property
    def leads(self) -> bool:
        return _says_sizes(self)

    def echo(self, rank: int, size: int, write_header: SealFor) -> list[Tensor]:
        return _echo(self, rank, size, write_header)


def _says_sizes(request: AllGather | AllToAll) -> bool:
    return all(payload.parts == SIZE for payload in request.sends())


def _echo(
    request: CodedAllGather | CodedAllToAll, rank: int, size: int, write_header: SealFor
) -> list[Tensor]:
    """What every rank sends if it sends what this one does; coded zeros where its payload is of other
    parts."""
    assert request.said is not None
    position, wires = request.position(rank), []
    own = request.payload_to(position)
    for sender, parts in zip(request.senders(size), request.plain, strict=True):
        alike = parts == request.plain[position]
        said = Payload(own.wire.clone(), own.parts) if alike else request.said(parts)
        write_header(sender, said)
        wires.append(said.wire)
    return wires


def _with(
    request: AllGather | AllToAll,
    payloads: tuple[Payload, ...],
    parts: tuple[Parts, ...] | None,
    plain: tuple[Parts, ...],
    said: Said,
) -> CodedAllGather | CodedAllToAll:
    """The same request of other payloads, which arrive as ``parts``."""
    if isinstance(request, AllGather):
        return CodedAllGather(payloads[0], parts, request.group, plain, said)
    return CodedAllToAll(payloads, parts, request.group, plain, said)


def _longer_by(request: Request, size: int) -> float:
    """By how many bytes a coded request may be longer than one that is not: sizes, and what is added."""
    assert isinstance(request, AllGather | AllToAll)
    sent = request.sends()
    if isinstance(request, AllGather):
        sent *= len(request.members(size))
    more = [wire_bytes(SIZE) + _most_coded(one.parts) - wire_bytes(one.parts) for one in sent]
    return (len(more) - 1) * max(more, default=0)


def _most_coded(parts: Parts) -> int:
    """Bytes of a payload of these parts that does not become shorter."""
    return wire_bytes(coded_parts(sum(4 + most_bytes(part.nbytes) for part in parts)))


INNER = qsgd()
"""Unless another is given: 4 bits."""


@register(
    paper="Duda, Asymmetric numeral systems, 2013; for gradients: Alistarh et al., QSGD, NeurIPS 2017",
    wire="inner's, times what its codes can be coded to, and 40 (n-1) for the sizes of each exchange",
    summable=False,
    biased=False,
    deviations="frequencies of bytes that hold several codes, measured in each 512 KiB, not Elias codes",
    limitations="on a fast network, where coding takes longer than it saves; behind methods that sum on the "
    "wire, for which it does nothing",
)
def lossless(inner: Method | str = INNER, entropy: str = "ans") -> Method:
    """Code the payloads of another method without loss: the same numbers, bit for bit, in fewer bytes.

    ``inner`` is a method or the text of one (``"qsgd:bits=2"``); ``entropy``: ``ans`` or ``zstd``. See
    :class:`distcomp.methods.Lossless`.
    """
    return Lossless(method_of(inner), entropy)
