"""Simulated replicas and the chats that clients hold with them. See `benchmarks.routing`."""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from compiledllm.remote.replicas import OUTPUT_TOKENS

SYSTEM_PROMPT_TOKENS = 600
VOCABULARY = list(range(30_000))
CACHE_TOKENS = 400_000  # of a replica: Llama-3.1-8B in 16 bits on a GPU of 80 GB


@dataclass(frozen=True)
class StepTimes:
    """Measured durations: Llama-3.1-8B on an H100, rows of 1024 tokens (benchmarks/README.md).

    base_s: a decode step of one row. row_s: added by each further row. prompt_s: the computation of
    one prompt token.
    """

    base_s: float = 5.52e-3
    row_s: float = (13.0e-3 - 5.52e-3) / 127
    prompt_s: float = 2.999 / (128 * 1024)


STEP = StepTimes()


class Chat:
    """A client's chat. tokens: all tokens up to the message that waits for an answer."""

    def __init__(self, number: int, rng: random.Random, systems: list[list[int]]) -> None:
        self.number, self._rng = number, rng
        weights = [1 / rank for rank in range(1, len(systems) + 1)]
        self.system = rng.choices(range(len(systems)), weights)[0]
        self.tokens = list(systems[self.system])
        self.home: int | None = None  # the replica of the last turn

    def write(self, num_tokens: int) -> None:
        self.tokens += self._rng.choices(VOCABULARY, k=num_tokens)

    def message_tokens(self) -> int:
        return max(4, min(2000, int(self._rng.lognormvariate(4.4, 1.0))))

    def answer_tokens(self) -> int:
        return max(4, min(1024, int(self._rng.lognormvariate(4.9, 0.9))))


class Replica:
    """An engine: its waiting prompts, its running requests, and the prefixes in its cache."""

    def __init__(self) -> None:
        self.outstanding = 0  # tokens, as the server counts them
        self.version = 0  # counts the calls of `next_end_s`: only the last result is up to date
        self._backlog_s = 0.0  # time to compute the waiting prompts
        self._clock = 0.0  # decode steps so far; a running request gets a token in each
        self._at_s = 0.0  # the time up to which the replica is simulated
        self._ends: list[tuple[float, int, Any]] = []  # heap of (clock at its end, number, request)
        # Number of cached tokens of each chat and system prompt, the longest unused one first.
        self._cache: OrderedDict[Any, int] = OrderedDict()
        self._cached = 0  # sum of the cache's numbers

    def known(self, chat: Chat) -> int:
        """Tokens of the chat's beginning that the cache holds."""
        system = -1 - chat.system
        return max(self._cache.get(chat.number, 0), self._cache.get(system, 0))

    def add(self, now_s: float, number: int, chat: Chat, answer: int) -> None:
        self._advance(now_s)
        self._backlog_s += (len(chat.tokens) - self.known(chat)) * STEP.prompt_s
        heapq.heappush(self._ends, (self._clock + answer, number, (chat, answer)))
        self.outstanding += len(chat.tokens) + OUTPUT_TOKENS
        self._keep(-1 - chat.system, SYSTEM_PROMPT_TOKENS)
        self._keep(chat.number, len(chat.tokens))

    def next_end_s(self) -> float:
        """The time at which the next request finishes, unless another one is added before."""
        self.version += 1
        if not self._ends:
            return float("inf")
        tokens = max(0.0, self._ends[0][0] - self._clock)
        return self._at_s + self._backlog_s + tokens * self._step_s()

    def finish(self, now_s: float) -> tuple[Chat, int]:
        """The request that finishes now, and the tokens of its answer."""
        self._advance(now_s)
        _, _, (chat, answer) = heapq.heappop(self._ends)
        self.outstanding -= len(chat.tokens) + OUTPUT_TOKENS
        self._keep(chat.number, len(chat.tokens) + answer - 1)
        return chat, answer

    def _step_s(self) -> float:
        return STEP.base_s + STEP.row_s * (len(self._ends) - 1)

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        of_prompts_s = min(passed_s, self._backlog_s)
        self._backlog_s -= of_prompts_s
        if self._ends:
            self._clock += (passed_s - of_prompts_s) / self._step_s()
        self._at_s = now_s

    def _keep(self, key: Any, num_tokens: int) -> None:
        """Cache `num_tokens` tokens of a chat or system prompt; evict the longest unused ones.

        A chat's tokens include those of its system prompt.
        """
        self._cached += num_tokens - self._cache.pop(key, 0)
        self._cache[key] = num_tokens
        while self._cached > CACHE_TOKENS:
            self._cached -= self._cache.popitem(last=False)[1]
