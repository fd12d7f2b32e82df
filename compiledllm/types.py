"""What crosses the engine: requests, sampling parameters, step input and output, results.

Pure Python (no torch), importable from everywhere. Names and meanings follow vLLM's where both have
the thing.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens")

FinishReason = Literal["stop", "length", "abort", "error"]


def reject_unknown(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError for the first of `names` not in `known`, with the nearest spelling."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"unknown {what} '{name}'; {hint}known: {', '.join(sorted(known))}")


def _strict_fields(what: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: keyword arguments that are no field are refused by name."""

    def decorate(cls: type[T]) -> type[T]:
        generated_init: Callable[..., None] = cls.__init__
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]

        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            reject_unknown(kwargs, known, what)
            generated_init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain_number(value: Any) -> Any:
    """A number of numpy's or torch's as Python's own; anything else as it is."""
    if isinstance(value, (int, float)) or not hasattr(value, "item"):
        return value
    return value.item() if getattr(value, "shape", None) == () else value


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= 1e38  # type: ignore[arg-type]  # a float32; false for NaN


def _require(ok: bool, name: str, value: object, must: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {must}, got {value!r}")


@_strict_fields("sampling field")
@dataclass(slots=True)
class SamplingParams:
    """How the next token is chosen and when a request ends. Field names and ranges are vLLM's.

    Unlike vLLM's 16, `max_tokens` defaults to None: generate to the end of the context.

    n: outputs per prompt; only 1 is supported.
    temperature: >= 0; 0 (below 1e-5) is greedy.
    top_p: (0, 1]; keep the smallest set of tokens whose probability reaches it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    seed: fixes the request's own random stream; None draws one from the engine's seed.
    max_tokens: most tokens to generate, >= 1; None: up to `max_model_len`.
    min_tokens: end-of-sequence and stop rules are off before this many tokens.
    stop: string or list of strings that end the text (matched on detokenised text, not included
        in the output unless `include_stop_str_in_output`).
    stop_token_ids: token ids that end the request.
    ignore_eos: go on past the end-of-sequence token.
    detokenize: False leaves `text` empty.
    skip_special_tokens: leave special tokens out of `text`.

    Raises ValueError naming the field, the value and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "temperature", "top_p"):
            setattr(self, name, _plain_number(getattr(self, name)))
        self.stop = self._checked_stop()
        self.stop_token_ids = list(self.stop_token_ids or [])
        for name in _SWITCHES:
            _require(
                isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False"
            )
        self._check_sampling()
        self._check_lengths()
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids instead")

    def _check_sampling(self) -> None:
        _require(self.n == 1 and _is_int(self.n), "n", self.n, "1 (more are not supported yet)")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            _require(_is_finite(value), name, value, "a finite number")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or above")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        top_k_ok = _is_int(self.top_k) and -1 <= self.top_k < 2**63
        _require(top_k_ok, "top_k", self.top_k, "an integer >= 1, or 0 or -1 for all tokens")
        seed_ok = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63)
        _require(seed_ok, "seed", self.seed, "None or a 64-bit integer")

    def _check_lengths(self) -> None:
        max_ok = self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1)
        _require(max_ok, "max_tokens", self.max_tokens, "an integer >= 1, or None for no limit")
        min_ok = _is_int(self.min_tokens) and self.min_tokens >= 0
        _require(min_ok, "min_tokens", self.min_tokens, "an integer >= 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )

    def _checked_stop(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        is_list = isinstance(stop, (list, tuple)) and all(isinstance(s, str) and s for s in stop)
        _require(is_list, "stop", self.stop, "a non-empty string or a list of non-empty strings")
        ids = [] if self.stop_token_ids is None else self.stop_token_ids
        ids_ok = isinstance(ids, (list, tuple)) and all(_is_int(i) and i >= 0 for i in ids)
        _require(ids_ok, "stop_token_ids", ids, "a list of token ids (integers >= 0)")
        return list(stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list it is after construction."""
        assert isinstance(self.stop, list)
        return self.stop


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


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
    arrival_time: float = field(default_factory=time.monotonic)

    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_tokens_in_flight: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    num_cached_tokens: int = -1  # prefix-cache hit at first admission; -1 until then
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_token_time: float | None = None
    most_tokens: int = 0  # prompt and output

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.most_tokens = len(self.prompt_token_ids) + self.max_tokens

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens whose KV is still missing; 0 also if the token in flight will be the last."""
        num_tokens = len(self.token_ids) + self.num_tokens_in_flight
        return 0 if num_tokens >= self.most_tokens else num_tokens - self.num_computed_tokens

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


class ScheduledRequest(NamedTuple):  # a frozen dataclass takes three times as long to make
    """One request's share of a step."""

    request_id: str
    num_computed_tokens: int  # KV already in the cache
    num_scheduled_tokens: int  # work in this step
    new_block_ids: list[int]  # to append to its block table
    samples: bool  # the step reaches the request's last known token, so a next one is drawn


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """All the work of one step. Order of `scheduled` is the order of rows in the batch."""

    new_requests: list[NewRequest]
    scheduled: list[ScheduledRequest]
    freed_request_ids: list[str]  # finished or preempted since the last step: rows to release

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(s.num_scheduled_tokens for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced: one token id for each request that sampled."""

    token_ids: dict[str, int]


@dataclass(slots=True)
class CompletionOutput:
    """One generated completion. Field names are vLLM's."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or token id that ended it
    cumulative_logprob: float | None = None
    logprobs: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds on `time.monotonic`'s clock."""

    arrival_time: float
    first_token_time: float | None
    last_token_time: float


@dataclass(slots=True)
class RequestOutput:
    """The state of one request as its caller sees it. Field names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    prompt_logprobs: None = None
