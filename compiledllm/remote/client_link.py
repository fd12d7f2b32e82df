"""A connection between the process that owns engines and a process that sends them requests."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from compiledllm.remote.shared_wire import ToClient, ToOwner, receive_in_client, receive_in_owner
from compiledllm.remote.wire import frame


class Link:
    """One end of the connection. Sending never waits: what cannot be sent yet is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def num_unread_bytes(self) -> int:
        """Bytes that wait in this process because the other one does not read."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message. The message is dropped if the connection is closed."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    def close(self) -> None:
        """Close the connection at once, without what has not been sent."""
        self._writer.transport.abort()


class ClientLink(Link):
    """The owner's end."""

    @classmethod
    async def open(cls, connection: socket.socket) -> ClientLink:
        return cls(*await asyncio.open_connection(sock=connection))

    async def receive(self) -> ToOwner | None:
        """Wait for the client's next message; None at the end. Raises WireError."""
        return await receive_in_owner(self._reader)


class OwnerLink(Link):
    """A client's end."""

    @classmethod
    async def open(cls, connection: socket.socket) -> OwnerLink:
        return cls(*await asyncio.open_connection(sock=connection))

    async def receive(self) -> ToClient | None:
        """Wait for the owner's next message; None at the end. Raises WireError."""
        return await receive_in_client(self._reader)
