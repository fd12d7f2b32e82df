"""Limits the number of connections and the time that a client may keep a connection waiting.

One sweep over all connections a second finds the overdue ones, so that neither a request nor a
streamed token sets a timer. A connection is an `http_protocol.LimitedHttp`; this module knows
nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

from compiledllm.config import ConfigError
from compiledllm.log import log

MAX_SPARE = 32  # connections beyond the limit, on which only health and metrics are served
SWEEP_INTERVAL_S = 1.0
LOG_INTERVAL_S = 30.0
NEARLY_FULL = 0.9  # of the limit, as a fraction


@dataclass(frozen=True, slots=True)
class Deadlines:
    """client_s: seconds to send a head, or without progress while sending a body or reading an
    answer. keep_alive_s: seconds a connection may idle between requests.
    """

    client_s: float
    keep_alive_s: float

    def __post_init__(self) -> None:
        if not min(self.client_s, self.keep_alive_s) > 0:
            raise ConfigError("--client-timeout and --keep-alive-timeout must be more than 0")


class Connection(Protocol):
    """The methods of a connection that `Connections` needs."""

    @property
    def since(self) -> float:
        """When the connection's stage began, in seconds of the event loop's clock."""

    def is_idle(self) -> bool:
        """Whether no part of a request has arrived and no answer is pending."""

    def end_if_overdue(self, now: float, deadlines: Deadlines) -> str | None:
        """End the connection if its client is overdue and return the cause, otherwise None."""

    def abort(self) -> None:
        """Close the connection at once."""


class Connections:
    """All connections of a server."""

    def __init__(self, max_connections: int, deadlines: Deadlines) -> None:
        self._max, self._deadlines = max_connections, deadlines
        self._max_spare = min(MAX_SPARE, max(max_connections // 4, 2))
        self._all: set[Connection] = set()
        self._spare: dict[Connection, None] = {}  # oldest first
        self._idle: deque[Connection] = deque()  # oldest first, as of the last sweep
        self._ended: Counter[str] = Counter()  # by cause, since the last log line
        self._num_refused = 0  # since the last log line
        # Earliest times of the next log lines about ended connections and about the limit.
        self._next_lines_at = [0.0, 0.0]

    def add(self, connection: Connection) -> bool:
        """Register a connection; False if only health and metrics may be served on it.

        At the limit, an idle connection is closed to make room. A new spare connection replaces the
        oldest one.
        """
        self._all.add(connection)
        if self.num_open <= self._max or self._close_an_idle_one():
            return True
        self._spare[connection] = None
        self._num_refused += 1
        if len(self._spare) > self._max_spare:
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.abort()
        return False

    @property
    def num_open(self) -> int:
        """The number of connections that count towards the limit."""
        return len(self._all)

    def discard(self, connection: Connection) -> None:
        self._all.discard(connection)
        self._spare.pop(connection, None)

    async def watch(self) -> None:
        """Sweep forever."""
        interval = min(SWEEP_INTERVAL_S, self._deadlines.client_s / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(interval)
            self.sweep(loop.time())

    def sweep(self, now: float) -> None:
        """End overdue connections and log how many, at most once per interval."""
        for connection in list(self._all):
            cause = connection.end_if_overdue(now, self._deadlines)
            if cause is not None:
                self._ended[cause] += 1
        is_nearly_full = self.num_open >= self._max * NEARLY_FULL
        self._idle = self._idle_ones(now) if is_nearly_full else deque()
        if self._ended and now >= self._next_lines_at[0]:
            self._next_lines_at[0] = now + LOG_INTERVAL_S
            self._tell_ended()
        if is_nearly_full and now >= self._next_lines_at[1]:
            self._next_lines_at[1] = now + LOG_INTERVAL_S
            self._tell_full()

    def _idle_ones(self, now: float) -> deque[Connection]:
        """The connections idle for a sweep interval, as a new client needs time to send."""
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
            "%d connections are open and %d may be (%d above the limit got health and metrics "
            "only); see --max-connections, --client-timeout and `ulimit -n`",
            self.num_open,
            self._max,
            self._num_refused,
        )
        self._num_refused = 0


def reset_transport(transport: asyncio.Transport) -> None:
    """Close at once and let the kernel discard the data that the client has not read."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # the connection is already reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
