"""Stands for one rank: gives what it was given to the warm process, and ends as the script ends.

Run as a file with ``python -I -S``: it imports nothing of distcomp and is there in milliseconds. When it is
killed, the warm process sees its connection close and kills the script.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

PATIENCE_S = 120.0


def main(directory: str, argv: list[str]) -> None:
    """Ask this rank's warm process to run ``argv``, and wait."""
    address = f"{directory}/rank{os.environ['RANK']}"
    message = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    with _connect(address) as warm:
        socket.send_fds(warm, [struct.pack("=I", len(message))], [1, 2])
        warm.sendall(message)
        answer = warm.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        sys.exit("the process that was to start this rank has died; use --cold to start each rank by itself")
    (status,) = struct.unpack("=i", answer)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def _connect(address: str) -> socket.socket:
    """The warm process listens before it imports anything, so there is little to wait for."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        warm = socket.socket(socket.AF_UNIX)
        try:
            warm.connect(address)
            return warm
        except (FileNotFoundError, ConnectionRefusedError):
            warm.close()
            if time.monotonic() > deadline_s:
                sys.exit("no process is there to start this rank; use --cold to start each rank by itself")
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
