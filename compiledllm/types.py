"""What crosses the engine: requests, and each step's input and output.

Pure Python (no torch), importable from everywhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from compiledllm.outputs import FinishReason
from compiledllm.sampling_params import SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Grammar(Protocol):
    """What an output has to look like, compiled (`grammars/grammar.py`)."""

    text: str  # from which it can be made again

    @property
    def num_mask_words(self) -> int:
        """uint32 words of a mask."""

    def matcher(self, output_token_ids: list[int]) -> Any:
        """The state behind these tokens of an output."""

    def fix_mask(self, matcher: Any, mask: Any) -> None:
        """Put right what a matcher allows, uint32 [words], where it is one word."""


@dataclass(slots=True, eq=False)
class Request:
    """One user's generation: its tokens, how far they are computed, and the blocks that hold them.

    The scheduler owns every field but the identity ones. `token_ids` is prompt + output; a token's
    KV is in the cache, or will be once the steps that were scheduled are done, when its index is
    below `num_computed_tokens`. `num_tokens_in_flight` tokens more have been drawn, or are being
    drawn, and are known to the device only.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_tokens: int  # resolved: never None
    stop_token_ids: frozenset[int] = frozenset()  # incl. end-of-sequence unless ignored
    seed: int = 0
    priority: int = 0
    prompt: str | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # as token ids
    cache_salt: str = ""  # the prefix cache is shared only between requests with the same
    grammar: Grammar | None = None  # of sampling_params.structured_outputs
    sibling: Request | None = None  # the first of those that share its prompt; None for itself
    waits_for_batch: bool = False  # nobody looks at it before its whole batch is over
    arrival_time: float = field(default_factory=time.monotonic)

    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_tokens_in_flight: int = 0
    num_tokens_to_drop: int = 0  # of those in flight: they follow from what was computed wrong
    is_second_try: bool = False  # its logits were NaN, or such, and it was started over
    block_tables: list[list[int]] = field(default_factory=list)  # one per group of layers
    first_blocks: list[int] = field(default_factory=list)  # of each table, what it still holds
    blocks_last_until: int = 0  # num_computed_tokens from which it wants others
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    num_cached_tokens: int = -1  # prefix-cache hit at first admission; -1 until then
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_token_time: float | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the output, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on
    most_tokens: int = 0  # prompt and output
    needs_last_token: bool = False  # on the host, before the next one can be drawn

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.most_tokens = len(self.prompt_token_ids) + self.max_tokens
        processors = self.sampling_params.logits_processors
        has_form = self.sampling_params.structured_outputs is not None
        self.needs_last_token = processors is not None or has_form or self.grammar is not None

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens whose KV is missing and can be computed now.

        0 also if the token in flight will be the last, or has to be known first.
        """
        in_flight = self.num_tokens_in_flight
        num_tokens = len(self.token_ids) + in_flight
        if num_tokens >= self.most_tokens or (in_flight and self.needs_last_token):
            return 0
        return num_tokens - self.num_computed_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_tokens_left(self) -> int:
        """Most tokens that may still be drawn."""
        return self.most_tokens - len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that enters the device table: first admission, or resumption after preemption."""

    request_id: str
    token_ids: list[int]  # prompt, plus outputs so far when resumed
    num_prompt_tokens: int
    sampling_params: SamplingParams
    stop_token_ids: frozenset[int]
    seed: int
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None


class ScheduledRequest(NamedTuple):  # a frozen dataclass takes three times as long to make
    """One request's share of a step."""

    request_id: str
    num_computed_tokens: int  # KV already in the cache
    num_scheduled_tokens: int  # work in this step
    new_block_ids: list[list[int]]  # to append to its block tables; [] if there are none
    samples: bool  # the step reaches the request's last known token, so a next one is drawn


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """All the work of one step. Order of `scheduled` is the order of rows in the batch."""

    new_requests: list[NewRequest]
    scheduled: list[ScheduledRequest]
    freed_request_ids: list[str]  # finished or preempted since the last step: rows to release
    spoilt_block_ids: list[int] = field(default_factory=list)  # held NaN: to be zeroed first

    @property
    def num_scheduled_tokens(self) -> int:
        return sum([line.num_scheduled_tokens for line in self.scheduled])


# Log probabilities at one position: token ids, their log probabilities, the own token's rank among
# all (1: the most likely), and how many of the most likely there are. First comes the own token,
# then the most likely, then those asked for. Plain tuples, as there may be millions: the garbage
# collector stops following those.
TokenLogprobs = tuple[tuple[int, ...], tuple[float, ...], int, int]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced, by request id: a token for each request that sampled.

    A negative token id: none could be drawn; `errors` says why. prompt_logprobs: the position of
    the first token they are of, and they.
    """

    token_ids: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
