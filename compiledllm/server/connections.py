"""How many connections there may be, and how long a client may keep one waiting.

One pass over all connections a second finds the overdue ones, so neither a request nor a streamed
token arms a timer. A connection is `http_protocol.LimitedHttp`; this file knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

from compiledllm.config import ConfigError
from compiledllm.log import log

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

MAX_DESCRIPTORS = 65_536  # the soft limit is raised to the hard one, and no further than this
MAX_CONNECTIONS = 8192  # unless asked for; each may hold a request of its own
RESERVED_DESCRIPTORS = 128  # files, the engine's socket, helper processes, spare connections
MAX_SPARE = 32  # connections beyond the limit, which may ask only how the server is
SWEEP_INTERVAL_S = 1.0
LOG_INTERVAL_S = 30.0
NEARLY_FULL = 0.9  # of the limit


@dataclass(frozen=True, slots=True)
class Deadlines:
    """client_s: for a head, and without progress of a body or of reading an answer.
    keep_alive_s: between requests.
    """

    client_s: float
    keep_alive_s: float

    def __post_init__(self) -> None:
        if not min(self.client_s, self.keep_alive_s) > 0:
            raise ConfigError("--client-timeout and --keep-alive-timeout must be more than 0")


class Connection(Protocol):
    """What is asked of a connection. since: the event loop's time when its stage began."""

    since: float

    def is_idle(self) -> bool:
        """Whether nothing of a request has come, and no answer is due."""

    def end_if_overdue(self, now: float, deadlines: Deadlines) -> str | None:
        """End the connection if its client is overdue; what the client failed to do, or None."""

    def abort(self) -> None:
        """Close at once."""


class Connections:
    """All connections of a server."""

    def __init__(self, max_connections: int, deadlines: Deadlines) -> None:
        self._max, self._deadlines = max_connections, deadlines
        self._max_spare = min(MAX_SPARE, max(max_connections // 4, 2))
        self._all: set[Connection] = set()
        self._spare: dict[Connection, None] = {}  # the oldest first
        self._idle: deque[Connection] = deque()  # the oldest first, as of the last sweep
        self._ended: Counter[str] = Counter()  # by cause, since the last line in the log
        self._num_refused = 0  # likewise
        self._next_lines_at = [0.0, 0.0]  # of those two, by the event loop's time

    def add(self, connection: Connection) -> bool:
        """Whether there is room; otherwise the connection may ask only how the server is.

        At the limit idle connections make room. Spare connections take the place of older ones.
        """
        self._all.add(connection)
        if len(self._all) <= self._max or self._close_an_idle_one():
            return True
        self._spare[connection] = None
        self._num_refused += 1
        if len(self._spare) > self._max_spare:
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.abort()
        return False

    def discard(self, connection: Connection) -> None:
        self._all.discard(connection)
        self._spare.pop(connection, None)

    async def watch(self) -> None:
        """Sweep for ever."""
        interval = min(SWEEP_INTERVAL_S, self._deadlines.client_s / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(interval)
            self.sweep(loop.time())

    def sweep(self, now: float) -> None:
        """End what is overdue, and say so in the log once in a while."""
        for connection in list(self._all):
            cause = connection.end_if_overdue(now, self._deadlines)
            if cause is not None:
                self._ended[cause] += 1
        is_nearly_full = len(self._all) >= self._max * NEARLY_FULL
        self._idle = self._idle_ones(now) if is_nearly_full else deque()
        if self._ended and now >= self._next_lines_at[0]:
            self._next_lines_at[0] = now + LOG_INTERVAL_S
            self._tell_ended()
        if is_nearly_full and now >= self._next_lines_at[1]:
            self._next_lines_at[1] = now + LOG_INTERVAL_S
            self._tell_full()

    def _idle_ones(self, now: float) -> deque[Connection]:
        """Those that have been idle for a while: a new one has not had time to say anything."""
        idle = (c for c in self._all if c.is_idle() and now - c.since >= SWEEP_INTERVAL_S)
        return deque(sorted(idle, key=lambda connection: connection.since))

    def _close_an_idle_one(self) -> bool:
        while self._idle:
            oldest = self._idle.popleft()
            if oldest in self._all and oldest.is_idle():
                self.discard(oldest)
                oldest.abort()
                return True
        return False

    def _tell_ended(self) -> None:
        for cause, count in self._ended.items():
            log.info("closed %d connections whose client %s", count, cause)
        self._ended.clear()

    def _tell_full(self) -> None:
        log.warning(
            "%d connections are open and %d may be (%d were beyond that); see --max-connections, "
            "--client-timeout and `ulimit -n`",
            len(self._all),
            self._max,
            self._num_refused,
        )
        self._num_refused = 0


def connection_limit(asked: int | None) -> int:
    """How many connections there may be: as asked, or as the limit on descriptors allows."""
    descriptors = _raise_descriptor_limit()
    room = max(descriptors - _num_open() - RESERVED_DESCRIPTORS, descriptors // 3)
    if asked is None:
        return min(room, MAX_CONNECTIONS)
    if not 1 <= asked <= room:
        raise ConfigError(
            f"--max-connections must be between 1 and {room} where {descriptors} files may be open "
            f"(`ulimit -n`), got {asked}"
        )
    return asked


def _raise_descriptor_limit() -> int:
    """The number of descriptors that the process may have, after asking for more."""
    if resource is None:
        return MAX_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    has_no_limit = hard == resource.RLIM_INFINITY
    wanted = MAX_DESCRIPTORS if has_no_limit else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def _num_open() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 32
