"""Which waiting request goes first, and which running one yields: an order on requests.

The first request in this order is never preempted, so something always finishes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from compiledllm.types import Request

SortKey = tuple[float, ...]
Policy = Callable[[Request], SortKey]


def fcfs(request: Request) -> SortKey:
    """First come, first served."""
    return (request.arrival_time,)


def priority(request: Request) -> SortKey:
    """Lower `priority` first, then first come, first served."""
    return (request.priority, request.arrival_time)


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": priority}


class WaitingQueue:
    """Waiting requests in policy order; ties in order of arrival at the queue."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[SortKey, int, Request]] = []
        self._order: dict[str, int] = {}  # request_id -> ticket, kept over a preemption
        self._tickets = 0

    def push(self, request: Request) -> None:
        ticket = self._order.setdefault(request.request_id, self._tickets)
        self._tickets += 1
        heapq.heappush(self._heap, (self._policy(request), ticket, request))

    def rank(self, request: Request) -> tuple[SortKey, int]:
        """Where a request stands, waiting or running: lower goes first and yields last."""
        return (self._policy(request), self._order[request.request_id])

    def peek(self) -> Request:
        return self._heap[0][2]

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[2]

    def remove(self, request: Request) -> None:
        self._heap = [entry for entry in self._heap if entry[2] is not request]
        heapq.heapify(self._heap)

    def forget(self, request: Request) -> None:
        """The request is over; its ticket can go."""
        self._order.pop(request.request_id, None)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in sorted(self._heap, key=lambda entry: entry[:2]))
