"""The engine's process from outside: started, written to, read, killed, mourned."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence

from compiledllm.server.running_log import RunningLog
from compiledllm.server.wire import FromEngine, ToEngine, frame, receive_async

ENGINE_COMMAND = (sys.executable, "-m", "compiledllm.server.engine_process")
_LAST_WORDS_S = 1.0  # for what an ended process has written to be read
_END_S = 5.0  # for a process that has closed its connection to end


class EngineChild:
    """One process of the engine, from `spawn` to `end`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        running: RunningLog,
    ) -> None:
        self.process = process
        self._reader, self._writer = reader, writer
        self._running = running
        self._exit = asyncio.create_task(process.wait())
        self._exit.add_done_callback(self._hang_up)

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineChild:
        """Raises OSError if there can be no such process now."""
        ours, theirs = socket.socketpair()
        running = RunningLog.create()
        fds = [theirs.fileno(), running.fd]
        try:
            process = await asyncio.create_subprocess_exec(
                *(*command, *map(str, fds)), pass_fds=fds, stdin=asyncio.subprocess.DEVNULL
            )
        except BaseException:
            ours.close()
            running.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer, running)

    @property
    def num_unread_bytes(self) -> int:
        """Written to the engine, and neither read nor on the way."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: ToEngine) -> None:
        """Queue a message; it is dropped if the connection is over."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> FromEngine | None:
        """The next message; None once the process has ended. Raises WireError."""
        return await receive_async(self._reader)

    def kill(self) -> None:
        """Also works on a process that is stopped. Its guardian ends what it has started."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def end(self) -> int:
        """Close the connection and wait for the process; its exit status."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._exit), _END_S)
        self.kill()
        return await self._exit

    def take_started(self) -> set[str]:
        """The ids of all requests that it began to run. Once, after its end."""
        names = self._running.read()
        self._running.close()
        return names

    def _hang_up(self, _exit: object) -> None:
        """The process has ended: so does the connection, even if a descendant has a copy of it."""
        loop = asyncio.get_running_loop()
        loop.call_later(_LAST_WORDS_S, self._writer.transport.abort)


def cause_of(status: int) -> str:
    """What an exit status says, as a sentence."""
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = f"signal {-status}"
    return f"its process was ended by {name}"
