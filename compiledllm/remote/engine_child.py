"""The engine's process as its client handles it: spawn, send, receive, kill, reap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from compiledllm.remote.running_log import RunningLog
from compiledllm.remote.wire import FromEngine, ToEngine, frame, receive_async

ENGINE_COMMAND = (sys.executable, "-m", "compiledllm.remote.engine_process")
_LAST_WORDS_S = 1.0  # time for reading the messages that an ended process has already written
_END_S = 5.0  # time limit for a process to exit after its connection is closed


class EngineProcess(Protocol):
    """An engine's process, on whatever machine."""

    async def wait(self) -> str:
        """Wait for the end. Returns how the process ended."""

    def kill(self) -> None:
        """Kill the process, even a stopped one; its guardian kills its child processes."""

    def take_started(self) -> set[str]:
        """The ids of all requests that began to run. Call once, after the end."""


class LocalProcess:
    """A child of this process."""

    def __init__(self, process: asyncio.subprocess.Process, running: RunningLog) -> None:
        self._process, self._running = process, running
        self.pid = process.pid

    async def wait(self) -> str:
        return how_it_ended(await self._process.wait())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def take_started(self) -> set[str]:
        names = self._running.read()
        self._running.close()
        return names


class EngineChild:
    """One engine process with its connection, from `spawn` to `end`."""

    def __init__(
        self,
        process: EngineProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self._reader, self._writer = reader, writer
        self._exit = asyncio.create_task(process.wait())
        self._exit.add_done_callback(self._hang_up)

    @classmethod
    async def spawn(
        cls, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> EngineChild:
        """Start a process on this machine. Raises OSError if the system cannot start one now.

        environment: variables besides this process's own.
        """
        ours, theirs = socket.socketpair()
        running = RunningLog.create()
        fds = [theirs.fileno(), running.fd]
        try:
            process = await asyncio.create_subprocess_exec(
                *(*command, *map(str, fds)),
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | dict(environment or {}),
            )
        except BaseException:
            ours.close()
            running.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(LocalProcess(process, running), reader, writer)

    @property
    def num_unread_bytes(self) -> int:
        """Bytes that wait in this process because the engine's socket buffer is full."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: ToEngine) -> None:
        """Queue a message. The message is dropped if the connection is closed."""
        self.send_frame(frame(message))

    def send_frame(self, raw: bytes) -> None:
        """Queue a message that is already encoded as a frame."""
        if not self._writer.is_closing():
            self._writer.write(raw)

    async def receive(self) -> FromEngine | None:
        """Wait for the next message; None once the process has ended. Raises WireError."""
        message: FromEngine | None = await receive_async(self._reader)
        return message

    def kill(self) -> None:
        """Kill the process, even a stopped one; the guardian kills its child processes."""
        self.process.kill()

    async def end(self) -> str:
        """Close the connection, wait for the process and return how it ended."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._exit), _END_S)
        self.kill()
        return await self._exit

    def take_started(self) -> set[str]:
        """The ids of all requests that began to run. Call once, after the process has ended."""
        return self.process.take_started()

    def _hang_up(self, _exit: object) -> None:
        """Close the connection of an ended process, which a descendant may still hold open."""
        loop = asyncio.get_running_loop()
        loop.call_later(_LAST_WORDS_S, self._writer.transport.abort)


Spawn = Callable[[Sequence[str], Mapping[str, str] | None], Awaitable[EngineChild]]


def how_it_ended(status: int) -> str:
    """An exit status as a sentence."""
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-status}"
    return f"its process was ended by {name}"
