"""What has the kernel's queue charged? One netlink question: 30 microseconds, and no privilege needed.

The queue counts whole Ethernet frames at the moment they leave: payload, TCP/IP headers and retransmissions.
That is the figure `tc -s qdisc` shows. (An interface's own counter sees less where segmentation is
offloaded.)
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_TCMSG = struct.Struct("=BxxxiIII")  # struct tcmsg: family, interface, handle, parent, info
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_RTM_GETQDISC, _RTM_NEWQDISC, _NLMSG_ERROR = 38, 36, 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_ECHO = 1, 4, 8  # without ECHO the answer goes only to listeners of a group
_FLAGS = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_ECHO
_TC_H_ROOT = 0xFFFFFFFF
_TCA_STATS2, _TCA_STATS_BASIC, _TCA_STATS_QUEUE = 7, 1, 3
_TIMEOUT_S = 5.0  # the kernel answers in microseconds; never hang if it does not


@dataclass(frozen=True)
class QueueCount:
    """What one interface's outgoing queue has counted since it was made."""

    sent_bytes: int
    sent_packets: int
    dropped_packets: int
    waiting_bytes: int


def read_qdisc_bytes(device: str) -> int:
    """Bytes that left through `device` in this network namespace, as its root qdisc counts them.

    Raises OSError where there is no such device, or none of its queues counts (a bare `noqueue`).
    """
    return read_qdisc(device).sent_bytes


def read_qdisc(device: str) -> QueueCount:
    """All that the root qdisc of `device` in this network namespace has counted; OSError as above."""
    index = socket.if_nametoindex(device)
    question = _TCMSG.pack(socket.AF_UNSPEC, index, 0, _TC_H_ROOT, 0)
    header = _HEADER.pack(_HEADER.size + len(question), _RTM_GETQDISC, _FLAGS, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        netlink.send(header + question)
        while True:
            for kind, body in _messages(netlink.recv(1 << 16)):
                if kind == _NLMSG_ERROR:  # also the acknowledgement, which comes after the answer
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, f"the queue of {device} has no counter ({os.strerror(code)})")
                if kind == _RTM_NEWQDISC:
                    return _count(body[_TCMSG.size :])


def _count(attributes: bytes) -> QueueCount:
    statistics = dict(_attributes(dict(_attributes(attributes))[_TCA_STATS2]))
    sent_bytes, sent_packets = struct.unpack_from("=QI", statistics[_TCA_STATS_BASIC])
    _, waiting_bytes, dropped_packets = struct.unpack_from("=III", statistics[_TCA_STATS_QUEUE])
    return QueueCount(sent_bytes, sent_packets, dropped_packets, waiting_bytes)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]  # the two high bits are flags
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
