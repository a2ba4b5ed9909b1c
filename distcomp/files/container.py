"""Deep Compression's file (``.dcz``): pruned, shared, coded weights, documented and checked byte by byte.

==========  =====================================================================================
bytes       what (little-endian)
==========  =====================================================================================
20          header: magic ``dcz1``, version u16, 0 u16, number of tensors u32, bytes of the table
            u32, CRC-32 of the table u32
table       per tensor: name length u16, name (UTF-8), dtype u8, dimensions u8, each size u32,
            coding u8 (0 raw, 1 shared, 2 DCT), bytes of the body u32, CRC-32 of the body u32
bodies      in the order of the table
==========  =====================================================================================

A raw body: coder u8 (0 as it is, 2 zlib), then the values. A shared body: bits of a gap u8, centroids u16,
nonzero weights u32, gaps u32; the centroids (float32); coder u8, bytes u32 and the gaps; coder u8, bytes u32
and the codes. Gap symbol g < 2^b - 1 stands for g zeros and a nonzero weight, 2^b - 1 for as many zeros and
no weight. A DCT body (version 2 of the file): clusters u16; the common kernels (float32); coder u8, bytes u32
and the cluster of each kernel, where there are clusters; then a shared body, of the remainders of all
coefficients.

Nothing in it is ever executed or unpickled. A reader needs memory for what the table declares, whatever the
bodies hold, and refuses more than it was told to allow, before it allocates. No body is longer than its
tensor's values and one byte.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.files import dct_pack
from distcomp.files.coding import AT_ONCE, CODERS, PACKED, ZLIB, CorruptFile, Symbols, decode, encode
from distcomp.files.k_means import shared_values

MAGIC, VERSION, NEWEST = b"dcz1", 1, 2
HEADER = struct.Struct("<4sHHIII")
SHARED_HEAD = struct.Struct("<BHII")
STREAM = struct.Struct("<BI")
CLUSTERS = struct.Struct("<H")
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
RAW, SHARED, DCT = 0, 1, 2
GAP_BITS = range(1, 9)
LIMIT_BYTES = 1 << 30
TENSOR_BYTES = 1 << 10
"""What a tensor takes in memory beside its values, at most: its name, its line of the table, the object."""
LONGEST_LINE = 2 + 65535 + 2 + 4 * 255 + 9


@dataclass(frozen=True)
class Size:
    """What one tensor takes in a file, and how it is coded there."""

    name: str
    numel: int
    active: int
    dense_bytes: int
    stored_bytes: int
    coding: str


def compress(state: Mapping[str, Tensor], bits: int = 5, dct: dct_pack.DctPack | None = None) -> bytes:
    """A model's tensors as the bytes of a ``.dcz`` file.

    float32 tensors whose nonzero values are at most ``2^bits`` different ones are stored exactly; so are
    those too small to share values in, and all other types. Otherwise nonzero values are shared: k-means with
    ``2^bits`` centroids (see :func:`distcomp.pruning.share` for training them), and what
    :func:`decompress` gives back are the centroids.

    With ``dct``, convolution kernels above 1 x 1 are packed in the frequency domain (CNNpack): common
    kernels, and remainders that are made smaller, rounded, and coded as shared values are. Other tensors are
    as above.

    Source: Han et al., Deep Compression, ICLR 2016. We differ: no filler zeros (a gap too long has a symbol
    of its own), gap widths by size, and zlib or packed bits where they beat Huffman's code.

    Raises DistcompError for tensors that are no numbers of a known type, and for more than 32-bit sizes.
    """
    if not 1 <= bits <= 12:
        raise DistcompError(f"{bits} bits per shared weight are not possible; choose 1 to 12")
    table, bodies = [], []
    for name, tensor in state.items():
        coding, body = _body(name, tensor.detach().cpu().contiguous(), bits, dct)
        raw = name.encode()
        if len(raw) > 65535 or tensor.dim() > 255 or tensor.numel() >= 1 << 31:
            raise DistcompError(f"{name[:80]} is too large for this format; leave it out")
        head = struct.pack("<H", len(raw)) + raw
        head += struct.pack(f"<BB{tensor.dim()}I", DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape)
        table.append(head + struct.pack("<BII", coding, len(body), zlib.crc32(body)))
        bodies.append(body)
    listed = b"".join(table)
    version = VERSION if dct is None else NEWEST  # files without DCT bodies are read by older readers
    header = HEADER.pack(MAGIC, version, 0, len(table), len(listed), zlib.crc32(listed))
    return b"".join([header, listed, *bodies])


def _body(name: str, tensor: Tensor, bits: int, dct: dct_pack.DctPack | None) -> tuple[int, bytes]:
    if tensor.dtype not in DTYPES:
        raise DistcompError(f"{name} is of type {tensor.dtype}, which this format does not know")
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    zipped = zlib.compress(raw, 9)
    plain = bytes([ZLIB]) + zipped if len(zipped) < len(raw) else bytes([PACKED]) + raw
    if tensor.dtype == torch.float32 and tensor.numel() and bool(torch.isfinite(tensor).all()):
        if dct is not None and dct_pack.is_kernel(tuple(tensor.shape)):
            coding, body = DCT, _frequencies(tensor.numpy(), dct)
        else:
            coding, body = SHARED, _shared(tensor.reshape(-1).numpy(), bits)
        if body is not None and len(body) < len(plain):
            return coding, body
    return RAW, plain


def _frequencies(weight: np.ndarray, how: dct_pack.DctPack) -> bytes | None:
    """The body of a weight that is packed by frequency; None where nothing is left of its remainders."""
    centres, members, rest = dct_pack.packed(weight, how)
    remainders = _shared(rest.reshape(-1), max(1, how.levels.bit_length()))
    if remainders is None:
        return None
    head = CLUSTERS.pack(len(centres)) + centres.astype("<f4").tobytes()
    if len(centres):
        coder, data = encode(members, len(centres))
        head += STREAM.pack(coder, len(data)) + data
    return head + remainders


def _shared(values: np.ndarray, bits: int) -> bytes | None:
    """The body of a tensor whose nonzero values share centroids; None where that is no use."""
    places = np.flatnonzero(values)
    centroids, codes = shared_values(values[places], 1 << bits)
    if not 0 < len(centroids) < 65536:
        return None
    ways = [(b, _gaps(places, b)) for b in GAP_BITS]
    b, gaps = min(ways, key=lambda way: len(encode(way[1], 1 << way[0])[1]))
    head = SHARED_HEAD.pack(b, len(centroids), len(places), len(gaps)) + centroids.astype("<f4").tobytes()
    streams = [encode(gaps, 1 << b), encode(codes, len(centroids))]
    return head + b"".join(STREAM.pack(coder, len(data)) + data for coder, data in streams)


def _gaps(places: Symbols, bits: int) -> Symbols:
    """Gap symbols: as many "no nonzero weight yet" as fit, then what is left."""
    most = (1 << bits) - 1
    gaps = np.diff(places, prepend=-1) - 1
    long, rest = gaps // most, gaps % most
    symbols = np.full(int(long.sum()) + len(gaps), most, np.int64)
    symbols[np.cumsum(long + 1) - 1] = rest
    return symbols


def _places(symbols: Symbols, bits: int, before: int = 0) -> tuple[Symbols, int]:
    """Where living weights are, and where the last symbol ends; the first begins at ``before``."""
    most = (1 << bits) - 1
    ends = before + np.cumsum(np.where(symbols == most, most, symbols + 1))
    places: Symbols = ends[symbols != most] - 1
    return places, int(ends[-1]) if ends.size else before


class _Reader:
    """Takes bytes from the front; never more than there are."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    @staticmethod
    def of(data: bytes | BinaryIO) -> _Reader:
        """Of bytes, or of a file that is read no further than it must be."""
        return _Reader(io.BytesIO(data) if isinstance(data, bytes | bytearray | memoryview) else data)

    def take(self, count: int) -> bytes:
        taken = self._stream.read(count)
        if len(taken) < count:
            raise CorruptFile("the file ends before what it announces: it was cut short")
        return taken

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def rest(self) -> bytes:
        return self._stream.read()

    @property
    def at_end(self) -> bool:
        return not self._stream.read(1)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    coding: int
    nbytes: int
    check: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def decompress(data: bytes | BinaryIO, limit_bytes: int = LIMIT_BYTES) -> dict[str, Tensor]:
    """The tensors of a ``.dcz`` file, bit for bit as they were coded.

    ``data``: its bytes, or the file, opened to read bytes; that is read no further than the limit allows.
    Memory: at most twice ``limit_bytes`` and a few megabytes.

    Raises CorruptFile for bytes that are damaged, cut short, or not of this format; DistcompError where the
    tensors, each with 1 KiB for itself, would take more than ``limit_bytes``.
    """
    reader = _Reader.of(data)
    state = {entry.name: _tensor(entry, reader.take(entry.nbytes)) for entry in _table(reader, limit_bytes)}
    _check_end(reader)
    return state


def _check_end(reader: _Reader) -> None:
    if not reader.at_end:
        raise CorruptFile("the file is longer than its table says: it was added to")


def sizes(data: bytes) -> list[Size]:
    """What each tensor of a file takes, its line in the table included."""
    reader = _Reader.of(data)
    sizes = []
    for entry in _table(reader, 1 << 62):
        body = reader.take(entry.nbytes)
        line = 2 + len(entry.name.encode()) + 2 + 4 * len(entry.shape) + 9
        active, coding = entry.numel, "raw, zlib" if body[:1] == bytes([ZLIB]) else "raw"
        if entry.coding == DCT:
            clusters, _, body = _cluster_parts(entry, body)
        if entry.coding in (SHARED, DCT):
            bits, centroids, active, _, (gaps, codes) = _streams(body)
            coding = (
                f"{centroids.size} centroids, {bits}-bit gaps: {CODERS[gaps[0]]}, codes: {CODERS[codes[0]]}"
            )
            if entry.coding == DCT:
                coding = f"DCT, {len(clusters)} common kernels, {coding}"
        dense = entry.numel * entry.dtype.itemsize
        sizes.append(Size(entry.name, entry.numel, active, dense, line + entry.nbytes, coding))
    _check_end(reader)
    return sizes


def _table(reader: _Reader, limit_bytes: int) -> list[_Entry]:
    magic, version, zero, count, length, check = HEADER.unpack(reader.take(HEADER.size))
    if magic != MAGIC or zero:
        raise CorruptFile("this is no .dcz file; name one that distcomp compress wrote")
    if not VERSION <= version <= NEWEST:
        raise CorruptFile(f"the file is of version {version}, this distcomp reads {NEWEST}; use a newer one")
    _check_limit(count * TENSOR_BYTES, limit_bytes)
    if length > count * LONGEST_LINE:
        raise CorruptFile("the table of tensors is damaged: it is longer than it could be")
    _check_limit(length, limit_bytes)
    listed = reader.take(length)
    if zlib.crc32(listed) != check:
        raise CorruptFile("the table of tensors is damaged: its checksum is wrong")
    table = _Reader.of(listed)
    entries = [_entry(table) for _ in range(count)]
    if not table.at_end or len({entry.name for entry in entries}) != count:
        raise CorruptFile("the table of tensors is damaged: it holds other tensors than it announces")
    _check_limit(sum(entry.dense_bytes + TENSOR_BYTES for entry in entries), limit_bytes)
    for entry in entries:
        if entry.nbytes > entry.dense_bytes + 1:
            raise CorruptFile(f"{entry.name} takes more bytes than it holds values: the file is damaged")
    return entries


def _check_limit(needed: int, limit_bytes: int) -> None:
    if needed > limit_bytes:
        raise DistcompError(
            f"the tensors would take {needed} bytes, more than the {limit_bytes} allowed; raise the limit if "
            "you trust the file"
        )


def _entry(table: _Reader) -> _Entry:
    (length,) = table.unpack("<H")
    try:
        name = table.take(length).decode()
    except UnicodeDecodeError:
        raise CorruptFile("the table of tensors is damaged: a name is no text") from None
    dtype, dims = table.unpack("<BB")
    if dtype >= len(DTYPES):
        raise CorruptFile(f"{name} is of an unknown type; the file is damaged or of a later version")
    shape = table.unpack(f"<{dims}I")
    coding, nbytes, check = table.unpack("<BII")
    return _Entry(name, DTYPES[dtype], shape, coding, nbytes, check)


def _tensor(entry: _Entry, body: bytes) -> Tensor:
    if zlib.crc32(body) != entry.check:
        raise CorruptFile(f"{entry.name} is damaged: its checksum is wrong")
    if entry.coding == SHARED and entry.dtype == torch.float32:
        return torch.from_numpy(_unshared(entry, body)).view(entry.shape)
    if entry.coding == DCT and entry.dtype == torch.float32 and dct_pack.is_kernel(entry.shape):
        centres, members, rest = _clusters(entry, body)
        values = _unshared(entry, rest).reshape(-1, math.prod(entry.shape[2:]))
        _from_frequencies(values, centres, members, entry.shape[2:])
        return torch.from_numpy(values).view(entry.shape)
    if entry.coding != RAW or body[:1] not in (bytes([PACKED]), bytes([ZLIB])):
        raise CorruptFile(f"{entry.name} is coded in an unknown way; the file is of a later version")
    nbytes = entry.numel * entry.dtype.itemsize
    coded = memoryview(body)[1:]
    raw = (decode(ZLIB, coded, nbytes, 256) if body[0] == ZLIB else np.frombuffer(coded, np.uint8)).copy()
    if raw.size != nbytes:
        raise CorruptFile(f"{entry.name} holds {raw.size} bytes where {nbytes} are due")
    if entry.dtype == torch.bool and raw.size and raw.max() > 1:
        raise CorruptFile(f"{entry.name} holds values that are neither true nor false")
    return torch.from_numpy(raw).view(entry.dtype).view(entry.shape) if nbytes else _empty(entry)


def _from_frequencies(
    values: np.ndarray, centres: np.ndarray, members: np.ndarray, plane: tuple[int, ...]
) -> None:
    """The kernels ``[kernels, taps]`` of their remainders, in place; some at a time, for they are float64
    meanwhile."""
    rows = max(1, AT_ONCE // values.shape[1])
    with np.errstate(all="ignore"):  # a damaged file may hold infinities
        for at in range(0, len(values), rows):
            part = values[at : at + rows].astype(np.float64)
            part += centres[members[at : at + rows]] if len(centres) else 0
            values[at : at + rows] = dct_pack.weights(part, (len(part), 1, *plane)).reshape(part.shape)


def _empty(entry: _Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype)


def _clusters(entry: _Entry, body: bytes) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Common kernels, which of them each kernel has, and the bytes of the remainders."""
    centres, stream, rest = _cluster_parts(entry, body)
    kernels = entry.numel // math.prod(entry.shape[2:])
    if stream is None:
        return centres, np.zeros(kernels, np.int64), rest
    return centres, decode(*stream, kernels, len(centres)), rest


def _cluster_parts(entry: _Entry, body: bytes) -> tuple[np.ndarray, tuple[int, bytes] | None, bytes]:
    """Common kernels, the coded numbers of those that each kernel has, and the bytes of the remainders."""
    if not dct_pack.is_kernel(entry.shape):
        raise CorruptFile(f"{entry.name} has no kernels and is coded as if: the file is damaged")
    reader, taps = _Reader.of(body), math.prod(entry.shape[2:])
    (count,) = CLUSTERS.unpack(reader.take(CLUSTERS.size))
    centres = np.frombuffer(reader.take(4 * count * taps), "<f4").reshape(count, taps)
    if not count:
        return centres, None, reader.rest()
    coder, nbytes = STREAM.unpack(reader.take(STREAM.size))
    return centres, (coder, reader.take(nbytes)), reader.rest()


Streams = tuple[tuple[int, bytes], tuple[int, bytes]]


def _streams(body: bytes) -> tuple[int, np.ndarray, int, int, Streams]:
    reader = _Reader.of(body)
    bits, count, active, gaps = SHARED_HEAD.unpack(reader.take(SHARED_HEAD.size))
    if bits not in GAP_BITS:
        raise CorruptFile(f"gaps of {bits} bits are not possible: the file is damaged")
    centroids = np.frombuffer(reader.take(4 * count), "<f4")
    streams = []
    for _ in range(2):
        coder, nbytes = STREAM.unpack(reader.take(STREAM.size))
        if coder not in CODERS:
            raise CorruptFile(f"there is no coder {coder}; the file is damaged or of a later version")
        streams.append((coder, reader.take(nbytes)))
    if not reader.at_end:
        raise CorruptFile("a tensor holds more bytes than it announces")
    return bits, centroids, active, gaps, (streams[0], streams[1])


def _unshared(entry: _Entry, body: bytes) -> np.ndarray:
    bits, centroids, active, count, (gaps, codes) = _streams(body)
    if not active <= count <= entry.numel or not centroids.size:
        raise CorruptFile(f"{entry.name} holds more weights than its shape: the file is damaged")
    symbols = decode(*gaps, count, 1 << bits)
    shared = decode(*codes, active, centroids.size)
    values = np.zeros(entry.numel, np.float32)
    end = filled = 0
    for start in range(0, count, AT_ONCE):
        places, end = _places(symbols[start : start + AT_ONCE].astype(np.int64), bits, end)
        if end > entry.numel and (len(places) and int(places[-1]) >= entry.numel):
            raise CorruptFile(f"{entry.name} has weights outside its shape: the file is damaged")
        if filled + len(places) > active:
            break
        values[places] = centroids[shared[filled : filled + len(places)]]
        filled += len(places)
    else:
        if filled == active:
            return values
    raise CorruptFile(f"{entry.name} holds another number of weights than it says: the file is damaged")
