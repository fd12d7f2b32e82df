"""JSON messages with a length prefix over a socket. No pickle, because the input may be hostile."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

TOO_LATE = "too late"  # the helper's report of a worker that its own timer killed
_HEAD = struct.Struct(">I")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    connection.sendall(_HEAD.pack(len(body)) + body)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for the next message; None if the other side has closed. Raises OSError."""
    head = _read(connection, _HEAD.size)
    body = None if head is None else _read(connection, _HEAD.unpack(head)[0])
    if body is None:
        return None
    message: dict[str, Any] = json.loads(body)
    return message


def skip(connection: socket.socket) -> None:
    """Drop the messages that have already arrived. The connection's timeout is kept."""
    limit_s = connection.gettimeout()
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.setblocking(False)
            is_open = connection.recv(1, socket.MSG_PEEK)
            connection.settimeout(limit_s)
            if not is_open:
                return
            receive(connection)
    connection.settimeout(limit_s)


def _read(connection: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        part = connection.recv(min(size - len(found), 2**20))
        if not part:
            return None
        found += part
    return bytes(found)
