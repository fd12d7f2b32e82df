"""Which waiting request goes first, and how much of a step prompts get beside those that decode.

The first request in the order is never preempted, so something always finishes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compiledllm.outputs import FinishReason
from compiledllm.types import Request

SortKey = tuple[float, ...]
Policy = Callable[[Request], SortKey]
_Entry = tuple[tuple[SortKey, int], int, Request]  # order, serial number, request

MAX_PASSED_OVER = 32
_MIN_COMPACTED = 64  # entries of a heap, below which it is not worth it


def fcfs(request: Request) -> SortKey:
    """First come, first served."""
    return (request.arrival_time,)


def priority(request: Request) -> SortKey:
    """Lower `priority` first, then first come, first served; see `WaitingQueue` about ageing."""
    return (request.priority, request.arrival_time)


# For so many a GPU computes as long as it reads the weights: its operations for each byte that it
# can read meanwhile, 150 to 300 of 16-bit numbers.
BALANCED_TOKENS = 256
_TOKENS_PER_ROW = 8  # of a step, at least
_WHERE_EVEN = 4  # times the balance, where as many requests wait as decode
_AT_MOST = 8  # times the balance, but for rows: such a step of an 8B model takes 0.05 s, on an H100

POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": priority}


class WaitingQueue:
    """Waiting requests in policy order; ties in order of arrival at the queue.

    Requests age: once `MAX_PASSED_OVER` requests that came later were let in before the eldest one
    that waits, the eldest goes before all others, and yields after all others when it runs. So
    every request runs in the end, whatever priorities keep coming, and where nobody waits for long
    nothing changes. Every operation takes O(log n): entries of requests that left stay in the heaps
    until they surface, or until they are most of a heap.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._by_rank: list[_Entry] = []
        self._by_age: list[_Entry] = []
        self._serials: dict[str, int] = {}  # request_id -> of its valid entries; who waits
        self._order: dict[str, int] = {}  # request_id -> ticket, kept over a preemption
        self._aged: set[str] = set()
        self._num_passed_over = 0  # requests let in since the eldest one could have been
        self._count = 0

    def push(self, request: Request) -> None:
        self._order.setdefault(request.request_id, self._count)
        self._insert(request)

    def rank(self, request: Request) -> tuple[SortKey, int]:
        """Where a request stands, waiting or running: lower goes first and yields last."""
        request_id = request.request_id
        is_aged = request_id in self._aged
        key = (-math.inf, request.arrival_time) if is_aged else self._policy(request)
        return (key, self._order[request_id])

    def peek(self) -> Request:
        return self._first(self._by_rank)

    def pop(self) -> Request:
        request = self.peek()
        self.remove(request)
        self._note_passed_over(request)
        return request

    def remove(self, request: Request) -> None:
        """Take a request out, if it waits."""
        self._serials.pop(request.request_id, None)
        most = 2 * len(self._serials) + _MIN_COMPACTED
        if max(len(self._by_rank), len(self._by_age)) > most:
            self._by_rank = self._valid(self._by_rank)
            self._by_age = self._valid(self._by_age)

    def forget(self, request: Request) -> None:
        """The request is over; its ticket can go."""
        self._order.pop(request.request_id, None)
        self._aged.discard(request.request_id)

    def __len__(self) -> int:
        return len(self._serials)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in sorted(self._valid(self._by_rank)))

    def _insert(self, request: Request) -> None:
        """Write a request's entries; those it had before are not valid any more."""
        serial = self._count = self._count + 1
        self._serials[request.request_id] = serial
        rank, ticket = self.rank(request), self._order[request.request_id]
        heapq.heappush(self._by_rank, (rank, serial, request))
        heapq.heappush(self._by_age, (((request.arrival_time,), ticket), serial, request))

    def _note_passed_over(self, admitted: Request) -> None:
        if not self._serials:
            self._num_passed_over = 0
            return
        eldest = self._first(self._by_age)
        if self._age(admitted) < self._age(eldest):
            self._num_passed_over = 0
            return
        self._num_passed_over += 1
        if self._num_passed_over >= MAX_PASSED_OVER and eldest.request_id not in self._aged:
            self._num_passed_over = 0
            self._aged.add(eldest.request_id)
            self._insert(eldest)

    def _age(self, request: Request) -> tuple[float, int]:
        return (request.arrival_time, self._order[request.request_id])

    def _first(self, heap: list[_Entry]) -> Request:
        """Of the requests that wait."""
        while not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][2]

    def _is_valid(self, entry: _Entry) -> bool:
        return self._serials.get(entry[2].request_id) == entry[1]

    def _valid(self, heap: list[_Entry]) -> list[_Entry]:
        return sorted(filter(self._is_valid, heap))  # a sorted list is a heap


@dataclass(frozen=True, slots=True)
class Share:
    """What prompts get of a step in which requests decode.

    prompt_tokens: of all prompts together, but for requests of a batch that are due: those with at
    least `due_from` tokens left to draw.
    """

    prompt_tokens: int
    due_from: float = math.inf

    def is_due(self, request: Request) -> bool:
        return request.waits_for_batch and request.num_tokens_left >= self.due_from


@dataclass(slots=True)
class Pace:
    """Shares steps between prompts and requests that decode.

    Decoding reads all weights for a few tokens. Up to `balanced_tokens` tokens in all, computing
    takes no longer than that: prompts beside those that decode are then almost free, while a prompt
    that has a step for itself pays for the reading again.

    - Where somebody waits for each token, a longer step costs everyone who decodes some time, and
      saves everyone who waits some reading of weights. The sum is least, and the work of a fixed
      number of clients done soonest, where steps grow with the root of how many wait for each that
      runs. They have at least eight tokens for each request, so that prompts keep up with the
      answers; beyond that at most eight times the balance: more are not computed faster.
    - Where somebody waits for a whole batch, prompts fill steps up to the balance: the longest
      request takes as many steps as it has tokens, whatever the others do. Only one that would be
      the last to end may not wait. How long they run is known by max_tokens alone: once a request
      has ended before that, no prompt waits any more.

    prompt_tokens: if given, always that many, for everybody.
    """

    balanced_tokens: int
    prompt_tokens: int | None = None
    lengths_are_known: bool = True

    def share(self, prompt: Request, running: Sequence[Request], num_waiting: int) -> Share:
        """Of a step with `running`, some of which decode.

        prompt: the best-ranked request that has one. It is never left without tokens for good.
        num_waiting: requests with a prompt that is not computed yet, this one too.
        """
        if self.prompt_tokens is not None:
            return Share(self.prompt_tokens)
        if prompt.waits_for_batch:
            return self._share_of_batch(prompt, running)
        rows = len(running)
        growth = min(_WHERE_EVEN * math.sqrt(num_waiting / rows), _AT_MOST)
        times = max(growth, _TOKENS_PER_ROW * rows / self.balanced_tokens, 1)
        power = 2 ** math.ceil(math.log2(times))  # such sizes are captured: nothing is padded
        return Share(self.balanced_tokens * power - rows)

    def _share_of_batch(self, prompt: Request, running: Sequence[Request]) -> Share:
        if not self.lengths_are_known or prompt.sampling_params.max_tokens is None:
            return Share(0, due_from=0)
        decoding = (r.num_tokens_left for r in running if r.num_output_tokens)
        room = self.balanced_tokens - len(running)
        return Share(max(room, 0), due_from=max(decoding, default=0))

    def note_end(self, request: Request, reason: FinishReason) -> None:
        """A request is over."""
        if request.waits_for_batch and reason not in ("length", "abort"):
            self.lengths_are_known = False
