"""The stage of a connection: what its client sends next, since when, and whether that is too long.

Times are in seconds of the event loop's clock. Nothing here sets a timer, since `connections.py`
sweeps over all connections.
"""

from __future__ import annotations

from typing import Final

from compiledllm.server.connections import Deadlines

# Minimum average rate of a body, in bytes per second, on top of twice the client timeout.
MIN_BODY_RATE = 32 * 1024
# The stages of a connection, by what its client sends next.
IDLE: Final = 0  # the beginning of a request
HEAD: Final = 1  # the rest of a head
BODY: Final = 2  # the rest of a body, and trailers
OVER: Final = 3  # nothing: input is discarded


class Progress:
    """stage: one of the stages above. since: when the stage began, or the server last had to act.

    num_body_bytes: received of the current body.
    """

    __slots__ = ("_body_mark", "_unread_mark", "num_body_bytes", "since", "stage")

    def __init__(self, now: float) -> None:
        self.stage: int = IDLE
        self.since = now
        self.num_body_bytes = 0
        self._body_mark = (0, 0.0)  # body bytes, and when a sweep first saw that number
        self._unread_mark: tuple[int, float] | None = None  # likewise for an answer's unread bytes

    def enter(self, stage: int, now: float) -> None:
        self.stage, self.since = stage, now
        if stage == BODY:
            self.num_body_bytes, self._body_mark = 0, (0, now)

    def wait_for_us(self, now: float) -> None:
        """Restart the client's time, because the server must act next, whatever the client does."""
        self.since, self._body_mark = now, (self.num_body_bytes, now)

    def why_overdue(self, now: float, deadlines: Deadlines, is_first: bool) -> str | None:
        """What the client failed to do in time; None if it has time left.

        is_first: whether the connection had no request yet. A body that arrives too slowly is not
        overdue, but slow (`is_body_slow`).
        """
        waited_s = now - self.since
        if self.stage == IDLE:
            limit_s = deadlines.client_s if is_first else deadlines.keep_alive_s
            return "sent nothing" if waited_s > limit_s else None
        if self.stage == HEAD:
            return "did not complete its headers" if waited_s > deadlines.client_s else None
        if self.num_body_bytes != self._body_mark[0]:
            self._body_mark = (self.num_body_bytes, now)
        is_silent = now - self._body_mark[1] > deadlines.client_s
        return "did not complete a body" if is_silent else None

    def is_body_slow(self, now: float, client_s: float) -> bool:
        """Whether the body that is being received is slower than MIN_BODY_RATE."""
        if self.stage != BODY:
            return False
        return now - self.since > 2 * client_s + self.num_body_bytes / MIN_BODY_RATE

    def is_unread(self, num_bytes: int, now: float, client_s: float) -> bool:
        """Whether the client has read nothing of an answer for `client_s` seconds.

        num_bytes: the answer's bytes that wait to be read; nothing is being added to them.
        """
        if self._unread_mark is None or num_bytes < self._unread_mark[0]:
            self._unread_mark = (num_bytes, now)
        return now - self._unread_mark[1] > client_s

    def note_read(self) -> None:
        """Note that no bytes of an answer wait to be read, or that more are being added."""
        self._unread_mark = None
