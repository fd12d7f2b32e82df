"""A connection between the process that owns engines and a process that sends them requests."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, ClassVar, Generic, Self, TypeVar

import msgspec

from compiledllm.remote.shared_wire import ToClient, ToOwner
from compiledllm.remote.wire import frame, receive_async

_Received = TypeVar("_Received")


class Link(Generic[_Received]):
    """One end of the connection. Sending never waits: messages that cannot be sent yet are kept."""

    decoder: ClassVar[msgspec.msgpack.Decoder[Any]]  # of the messages that this end receives

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, connection: socket.socket) -> Self:
        return cls(*await asyncio.open_connection(sock=connection))

    @property
    def num_unread_bytes(self) -> int:
        """Bytes that wait in this process because the other one does not read."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message. The message is dropped if the connection is closed."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> _Received | None:
        """Wait for the next message; None at the end. Raises WireError."""
        message: _Received | None = await receive_async(self._reader, self.decoder)
        return message

    def close(self) -> None:
        """Close the connection at once; messages that have not been sent are lost."""
        self._writer.transport.abort()


class ClientLink(Link[ToOwner]):
    """The owner's end."""

    decoder = msgspec.msgpack.Decoder(ToOwner)


class OwnerLink(Link[ToClient]):
    """A client's end."""

    decoder = msgspec.msgpack.Decoder(ToClient)
