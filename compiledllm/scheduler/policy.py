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


def fcfs(request: Request) -> SortKey:
    """First come, first served."""
    return (request.arrival_time,)


def priority(request: Request) -> SortKey:
    """Lower `priority` first, then first come, first served."""
    return (request.priority, request.arrival_time)


# For so many a GPU computes as long as it reads the weights: its operations for each byte that it
# can read meanwhile, 150 to 300 of 16-bit numbers.
BALANCED_TOKENS = 256
_TOKENS_PER_ROW = 8  # of a step, at least
_WHERE_EVEN = 4  # times the balance, where as many requests wait as decode
_AT_MOST = 8  # times the balance, but for rows: such a step of an 8B model takes 0.05 s, on an H100

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
