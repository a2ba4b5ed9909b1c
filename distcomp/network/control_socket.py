"""How the emulator and its holder process speak: each request is a letter with its own return envelope.

The control socket only carries one end of a fresh socket pair, plus file descriptors that belong to the
request. On that pair go length-prefixed JSON objects, so any thread may ask at any time and no answer is
mistaken for another's.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

from distcomp.errors import DistcompError
from distcomp.network.netns import Refused

_LENGTH = struct.Struct("=I")
_MOST_DESCRIPTORS = 8
_ANSWER_S = 120.0  # building a thousand hosts takes a minute
_DEAD = "the process that holds the emulated network has died; start the emulation again"


def post(control: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> socket.socket:
    """Send a request with descriptors; the socket returned is where its answers arrive."""
    ours, theirs = socket.socketpair()
    ours.settimeout(_ANSWER_S)
    try:
        with theirs:
            socket.send_fds(control, [b"!"], [theirs.fileno(), *descriptors])
        send_message(ours, message)
    except ConnectionError:
        ours.close()
        raise DistcompError(_DEAD) from None
    return ours


def answer(envelope: socket.socket) -> dict[str, Any]:
    """The answer to a request; if the holder could not do what was asked, an error with its sentence."""
    message = receive(envelope)
    if message is None:
        raise DistcompError(_DEAD)
    if "refused" in message:
        raise Refused(message["refused"])
    if "error" in message:
        raise DistcompError(message["error"])
    return message


def collect(control: socket.socket) -> tuple[socket.socket, dict[str, Any], list[int]] | None:
    """The next request: its envelope, message and descriptors. None when the other side has closed."""
    mark, descriptors, _, _ = socket.recv_fds(control, 1, _MOST_DESCRIPTORS)
    if not mark:
        return None
    envelope = socket.socket(fileno=descriptors[0])
    message = receive(envelope)
    return None if message is None else (envelope, message, list(descriptors[1:]))


def send_message(envelope: socket.socket, message: dict[str, Any]) -> None:
    """Write one JSON object."""
    data = json.dumps(message).encode()
    envelope.sendall(_LENGTH.pack(len(data)) + data)


def receive(envelope: socket.socket) -> dict[str, Any] | None:
    """Read one JSON object; None when the other side has closed."""
    header = _exactly(envelope, _LENGTH.size)
    data = _exactly(envelope, _LENGTH.unpack(header)[0]) if header else b""
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


def _exactly(envelope: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        try:
            piece = envelope.recv(length - len(data))
        except ConnectionError:
            return b""
        if not piece:
            return b""
        data += piece
    return data
