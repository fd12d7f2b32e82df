"""Errors of requests to an engine in another process, other than errors of the request itself."""

from __future__ import annotations


class Unavailable(Exception):
    """The engine accepts no requests: it is loading, draining or dead. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Overloaded(Exception):
    """The limit on waiting requests or tokens is reached. retry_after: seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class EngineError(Exception):
    """The engine could not finish a request, through no fault of the request."""


EngineDeadError = EngineError  # vLLM's name


class DeadlineExceeded(Exception):
    """A request took longer than allowed."""
