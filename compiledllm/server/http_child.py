"""The owner's handle of one HTTP process: spawn, send, receive, kill, reap."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

from compiledllm.remote.client_link import ClientLink
from compiledllm.remote.shared_wire import Begin
from compiledllm.remote.wire import Failed
from compiledllm.server.process_settings import ProcessSettings

COMMAND = (sys.executable, "-m", "compiledllm.server.http_process")
_END_S = 5.0  # time limit for a process to exit after its connection is closed
_LAST_WORDS_S = 1.0  # time for reading the messages that a process wrote before it ended


class HttpChild:
    """An HTTP process from `spawn` to `end`.

    Attributes: `num_silent_s` (seconds since its last report, counted by the owner), `has_reported`
    (whether it has reported at all), `failure` (the error that the process sent before it ended, if
    any).
    """

    def __init__(
        self, process: asyncio.subprocess.Process, link: ClientLink, settings: ProcessSettings
    ) -> None:
        self.process, self.link, self.settings = process, link, settings
        self.failure: Failed | None = None
        self.num_silent_s = 0
        self.has_reported = False
        self._exit = asyncio.create_task(process.wait())
        self._exit.add_done_callback(self._hang_up)

    @classmethod
    async def spawn(cls, settings: ProcessSettings, table_fd: int) -> HttpChild:
        """Start a process. Raises OSError if the system cannot start one now.

        table_fd: descriptor of the shared table.
        """
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), table_fd]
        try:
            process = await asyncio.create_subprocess_exec(
                *(*COMMAND, *map(str, fds)),
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for the owner
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        link = await ClientLink.open(ours)
        link.send(Begin(settings.as_json()))
        return cls(process, link, settings)

    def note_report(self) -> None:
        self.num_silent_s, self.has_reported = 0, True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def end(self) -> int:
        """Close the connection, wait for the process and return its exit status."""
        self.link.close()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._exit), _END_S)
        self.kill()
        return await self._exit

    def _hang_up(self, _exit: object) -> None:
        """Close the connection of an ended process, as a descendant may still hold it open."""
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self.link.close)
