"""Order of waiting requests, and how much of a step prompts get while other requests decode.

The first request in the order is never preempted, so some request always finishes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compiledllm.outputs import FinishReason
from compiledllm.scheduler.prompt_budget import ItlTarget, PromptBudget
from compiledllm.types import Request

SortKey = tuple[float, ...]
Policy = Callable[[Request], SortKey]
_Entry = tuple[tuple[SortKey, int], int, Request]  # rank or age, serial number, request

MAX_PASSED_OVER = 32  # requests
_MIN_COMPACTED = 64  # heap entries; smaller heaps are not worth compacting


def fcfs(request: Request) -> SortKey:
    """First come, first served."""
    return (request.arrival_time,)


def priority(request: Request) -> SortKey:
    """Lower `priority` first, then first come, first served; `WaitingQueue` adds ageing."""
    return (request.spec.priority, request.arrival_time)


# Roofline balance: with about 256 tokens a step takes as long to compute as to read the weights
# (150 to 300 FLOP per byte, 16-bit).
BALANCED_TOKENS = 256
_MIN_TOKENS_PER_RUNNING = 8  # smallest step size, in tokens per running request
_GROWTH_AT_PARITY = 4  # step size if as many requests wait as run, in multiples of the balance
# Largest step size, in multiples of the balance, unless _MIN_TOKENS_PER_RUNNING demands more. At
# this size a step of an 8B model takes 0.05 s on an H100.
_MAX_GROWTH = 8

POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": priority}


class WaitingQueue:
    """Waiting requests in policy order; ties in order of arrival at the queue.

    Requests age: once `MAX_PASSED_OVER` younger requests were admitted before the oldest waiting
    request, the oldest is scheduled before all others and, while it runs, preempted last. So every
    request runs eventually, whatever priorities keep arriving, and the order is the policy's as
    long as no request waits long. Every operation takes O(log n), amortised: entries of requests
    that left stay in the heaps until they surface, or until they are most of a heap.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._by_rank: list[_Entry] = []
        self._by_age: list[_Entry] = []
        self._serials: dict[str, int] = {}  # waiting request_id -> serial of its valid entries
        self._order: dict[str, int] = {}  # request_id -> ticket, kept over a preemption
        self._aged: set[str] = set()
        self._num_passed_over = 0  # younger requests admitted before the oldest waiting request
        self._count = 0

    def push(self, request: Request) -> None:
        self._order.setdefault(request.request_id, self._count)
        self._insert(request)

    def rank(self, request: Request) -> tuple[SortKey, int]:
        """Rank of a waiting or running request: lower is scheduled first and preempted last."""
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
        """Remove a request from the queue, if it is waiting."""
        self._serials.pop(request.request_id, None)
        max_entries = 2 * len(self._serials) + _MIN_COMPACTED
        if max(len(self._by_rank), len(self._by_age)) > max_entries:
            self._by_rank = self._valid(self._by_rank)
            self._by_age = self._valid(self._by_age)

    def forget(self, request: Request) -> None:
        """Drop the ticket and the age of a request that has ended."""
        self._order.pop(request.request_id, None)
        self._aged.discard(request.request_id)

    def __len__(self) -> int:
        return len(self._serials)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in sorted(self._valid(self._by_rank)))

    def _insert(self, request: Request) -> None:
        """Push a request's entries onto both heaps; its earlier entries become invalid."""
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
        """The first waiting request of a heap; invalid entries above it are dropped."""
        while not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][2]

    def _is_valid(self, entry: _Entry) -> bool:
        return self._serials.get(entry[2].request_id) == entry[1]

    def _valid(self, heap: list[_Entry]) -> list[_Entry]:
        return sorted(filter(self._is_valid, heap))  # a sorted list is a heap


@dataclass(slots=True)
class Pace:
    """Splits steps between prompts and requests that decode.

    A decode step reads all weights for a few tokens. Up to `balanced_tokens` tokens in the step,
    computing takes no longer than reading: prompt tokens up to this balance are almost free, while
    a prompt in a step of its own pays for reading the weights again.

    - Callers that wait for each token: a longer step delays every decoding request, and saves every
      waiting request some reading of weights. The total delay is smallest, and a fixed number of
      clients is done soonest, if step sizes grow with the square root of the number of waiting
      requests per running request. A step has at least 8 tokens per running request, so that
      prompts keep up with decoding, and otherwise at most 8 times the balance, beyond which
      computing gets no more efficient.
    - Callers that wait for a whole batch: prompts fill steps up to the balance, since the longest
      request takes as many steps as it has tokens, whatever the other requests do. Only a request
      that would end last must not wait: it is exempt from the budget. The only estimate of a
      request's length is max_tokens, so once a request has ended earlier, no prompt waits any more.

    Attention makes a prompt token at a late position cost more: 1 + position / `parity` times as
    much. A step larger than the balance shrinks until it costs no more than at position 0.

    prompt_tokens: if given, the prompts' budget in every step. parity: the position from which a
    prompt token costs double. target: if given, chooses the budget where callers wait for each
    token.
    """

    balanced_tokens: int
    prompt_tokens: int | None = None
    parity: float = math.inf
    target: ItlTarget | None = None
    lengths_are_known: bool = True

    def prompt_budget(
        self, prompt: Request, running: Sequence[Request], num_waiting: int
    ) -> PromptBudget:
        """The prompts' budget in a step with the requests `running`, some of which decode.

        prompt: the best-ranked request whose prompt is not computed; it never starves.
        num_waiting: number of requests whose prompts are not computed, `prompt` included.
        """
        if self.prompt_tokens is not None:
            return PromptBudget(self.prompt_tokens)
        if prompt.spec.waits_for_batch:
            return self._budget_of_batch(prompt, running)
        if self.target is not None:
            return self.target.prompt_budget(running)
        rows = len(running)
        growth = min(_GROWTH_AT_PARITY * math.sqrt(num_waiting / rows), _MAX_GROWTH)
        times = max(growth, _MIN_TOKENS_PER_RUNNING * rows / self.balanced_tokens, 1)
        power = 2 ** math.ceil(math.log2(times))  # CUDA graphs exist for such sizes
        max_cost = max(power, _MAX_GROWTH)
        while power > 1 and power * (1 + prompt.num_computed_tokens / self.parity) > max_cost:
            power //= 2
        return PromptBudget(self.balanced_tokens * power - rows)

    def _budget_of_batch(self, prompt: Request, running: Sequence[Request]) -> PromptBudget:
        if not self.lengths_are_known or prompt.spec.sampling_params.max_tokens is None:
            return PromptBudget(0, exempt_from=0)
        decoding = (r.num_tokens_left for r in running if r.num_output_tokens)
        room = self.balanced_tokens - len(running)
        return PromptBudget(max(room, 0), exempt_from=max(decoding, default=0))

    def note_end(self, request: Request, reason: FinishReason) -> None:
        """Learn, when a request ends, whether max_tokens still tells the lengths of requests."""
        if request.spec.waits_for_batch and reason not in ("length", "abort"):
            self.lengths_are_known = False
