"""Data that crosses the engine's layers: requests, and each step's input and output.

Pure Python (no torch), importable from everywhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from compiledllm.outputs import FinishReason
from compiledllm.pooling_params import PoolingKind
from compiledllm.sampling_params import SamplingParams
from compiledllm.structured_outputs import ReasoningTokens


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Grammar(Protocol):
    """The form that an output must have, compiled (`grammars/grammar.py`)."""

    text: str  # from which the grammar can be compiled again

    @property
    def num_mask_words(self) -> int:
        """Number of uint32 words in a mask over the vocabulary."""

    def matcher(self, output_token_ids: list[int]) -> Any:
        """A matcher in the state after these output tokens."""

    def fix_mask(self, matcher: Any, mask: Any) -> None:
        """Correct a mask, uint32 [words], in place, if the grammar allows only one text next."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """The description of one generation. Made once, never changed, sent to the engine's process.

    A new field of a request is one line here and one where the field is used.

    sampling_params: without texts, which the caller's process deals with (`without_text`).
    stop_token_ids: include the end-of-sequence ids, unless ignored. bad_words: their token ids.
    cache_salt: requests share cached prefixes only if their salts are equal. grammar: text of the
    compiled grammar of structured_outputs (`Grammar.text`). reasoning: comes before what the
    grammar describes. sibling_id: with n > 1, the id of the first request, whose prompt blocks the
    others share. waits_for_batch: the caller sees no output before its whole batch has ended.
    pooling: how the prompt's hidden states become one vector; a request that pools has max_tokens
    0, which draws no token.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_tokens: int  # resolved: never None
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_salt: str = ""
    grammar: str | None = None
    reasoning: ReasoningTokens | None = None
    sibling_id: str | None = None
    waits_for_batch: bool = False
    pooling: PoolingKind | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(slots=True, eq=False)
class Request:
    """The progress of one generation: its tokens, how far they are computed, and its KV blocks.

    Only the scheduler changes a request, and a request never leaves the scheduler's process.
    `token_ids` is prompt + output. A token whose index is below `num_computed_tokens` has its KV in
    the cache, or will have it once the scheduled steps are done. Another `num_tokens_in_flight`
    tokens are drawn, or being drawn, and known to the device only.
    """

    spec: RequestSpec
    grammar: Grammar | None = None  # compiled from spec.grammar
    arrival_time: float = field(default_factory=time.monotonic)  # in the engine
    sibling: Request | None = None  # the live request with the id spec.sibling_id

    request_id: str = field(init=False)
    num_prompt_tokens: int = field(init=False)
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_tokens_in_flight: int = 0
    # In-flight tokens to ignore on arrival: they were drawn from state that was thrown away.
    num_tokens_to_drop: int = 0
    is_second_try: bool = False  # its logits were NaN or infinite, so the request was started over
    block_tables: list[list[int]] = field(default_factory=list)  # one per group of layers
    # Per table, index of the first block that the request still owns.
    first_owned_blocks: list[int] = field(default_factory=list)
    # At this num_computed_tokens the request must go back to the KV manager: it needs blocks, or
    # can give some back.
    next_kv_check: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    # For models with states, in tokens: position of the last snapshot at a fixed point, position of
    # the last snapshot of either kind, and length of the prefix that an earlier request computed.
    state_kept_at: int = 0
    latest_state_at: int = 0
    diverges_at: int = 0
    latest_state: bytes = b""  # hash of the block before the snapshot that moves with the request
    num_cached_tokens: int = -1  # prefix-cache hit at first admission; -1 until then
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on
    max_tokens_total: int = field(init=False)  # largest number of prompt and output tokens
    # The host must know the last token before the next token is drawn.
    needs_last_token: bool = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        self.request_id, self.num_prompt_tokens = spec.request_id, spec.num_prompt_tokens
        self.token_ids = list(spec.prompt_token_ids)
        self.max_tokens_total = len(self.token_ids) + spec.max_tokens
        has_processors = spec.sampling_params.logits_processors is not None
        self.needs_last_token = has_processors or self.grammar is not None

    @property
    def num_tokens_to_compute(self) -> int:
        """Number of tokens whose KV is missing and can be computed now.

        0 if the token in flight will be the last one, or must be known on the host first. Also 0
        once the whole prompt of a request that draws no token is in flight.
        """
        in_flight = self.num_tokens_in_flight
        num_tokens = len(self.token_ids) + in_flight
        if in_flight and (num_tokens >= self.max_tokens_total or self.needs_last_token):
            return 0
        return num_tokens - self.num_computed_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_left(self) -> int:
        """Largest number of tokens that may still be drawn."""
        return self.max_tokens_total - len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that enters the device's table: newly admitted, or resumed after preemption."""

    spec: RequestSpec
    token_ids: list[int]  # prompt, plus outputs so far when resumed
    grammar: Grammar | None = None


class ScheduledRequest(NamedTuple):  # a frozen dataclass takes three times as long to build
    """One request's share of a step."""

    request_id: str
    num_computed_tokens: int  # KV already in the cache
    num_scheduled_tokens: int  # tokens to compute in this step
    new_block_ids: list[list[int]]  # per group, to append to its block table; [] if none are new
    samples: bool  # the step reaches the request's last token, so the next one is drawn


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """All the work of one step. `scheduled` is in the order of the batch's rows."""

    new_requests: list[NewRequest]
    scheduled: list[ScheduledRequest]
    freed_request_ids: list[str]  # finished or preempted since the last step: rows to release
    spoilt_block_ids: list[int] = field(default_factory=list)  # blocks with NaN, to zero first
    # Copies of states before the step, all saves first: (request id, slot of the snapshot).
    saved_states: list[tuple[str, int]] = field(default_factory=list)
    restored_states: list[tuple[str, int]] = field(default_factory=list)
    # Snapshots that the step takes while it computes: (request id, slot of the snapshot, number of
    # the request's tokens in this step after which the state is kept).
    kept_states: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def num_scheduled_tokens(self) -> int:
        return sum([line.num_scheduled_tokens for line in self.scheduled])


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long steps take on this device, as measured at start.

    sizes: (tokens, seconds) of a step with one prompt chunk of so many tokens at position 0,
    ascending; the first entry is a decode step of one request. read_s: seconds per token of context
    that a decoding request reads. pair_s: seconds per pair of a prompt token and an earlier token
    of the request that an earlier step computed.
    """

    sizes: tuple[tuple[int, float], ...]
    read_s: float
    pair_s: float


# Log probabilities at one position: token ids, their log probabilities, the rank of the position's
# own token (1: the most likely), and the number of top tokens. The position's own token comes
# first, then the top tokens, then tokens requested by id. These are plain tuples since there may be
# millions, and the garbage collector does not track tuples of numbers.
TokenLogprobs = tuple[tuple[int, ...], tuple[float, ...], int, int]
_NO_LOGPROBS: list[TokenLogprobs] = []  # shared, so it must never be modified


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The results of a step, by request id: a token for each request that sampled.

    token_ids: negative if no token could be drawn; `errors` may say why. prompt_logprobs: the
    position of a prompt token, and log probabilities from that token on. pooled: float32 vectors of
    requests that pool, as bytes.
    """

    token_ids: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    pooled: dict[str, bytes] = field(default_factory=dict)


class RequestUpdate(NamedTuple):  # msgspec encodes a named tuple as an array: no names per request
    """What a request gained with its first token, or how it ended.

    num_cached_tokens: prompt tokens found in the prefix cache. prompt_logprobs: all of them, with
    the request's first token. pooled: the vector of a request that pools, float32 in the machine's
    byte order.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = _NO_LOGPROBS
    prompt_logprobs: list[TokenLogprobs] = _NO_LOGPROBS
    pooled: bytes | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] = _NO_LOGPROBS,
        pooled: bytes | None = None,
    ) -> RequestUpdate:
        """The state of a request that has just got these tokens."""
        is_first = request.num_output_tokens == len(token_ids)
        return cls(
            request.request_id,
            token_ids,
            request.finish_reason,
            request.stop_reason,
            max(request.num_cached_tokens, 0),
            logprobs,
            request.prompt_logprobs if is_first else _NO_LOGPROBS,
            pooled,
        )


@dataclass(slots=True)
class StepNews:
    """What a step did to requests, as plain data.

    token_ids: by request id, for requests that gained one token and go on, as most do, with their
    `logprobs` if requested. Decoding a list of updates instead takes ten times as long. started: by
    request id, when requests first got room in a step, in seconds of `time.monotonic`, a clock that
    processes share.
    """

    token_ids: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    updates: list[RequestUpdate] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that requests gained."""
        return len(self.token_ids) + sum([len(update.token_ids) for update in self.updates])

    @property
    def request_ids(self) -> list[str]:
        """The ids of all requests that gained a token or ended."""
        return [*self.token_ids, *[update.request_id for update in self.updates]]
