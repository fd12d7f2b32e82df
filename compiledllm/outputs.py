"""The outputs that callers get. Field names are vLLM's. Pure Python, importable from everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log probability, its rank among all tokens (1: the most likely) and its text.

    rank is None for a token that was requested by id.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # by token id; the position's own token comes first


@dataclass(slots=True)
class CompletionOutput:
    """One generated completion.

    stop_reason: the stop string or token id that ended the completion; with finish_reason "error",
    the error message. logprobs: one entry per token of token_ids, if requested. text_offsets: given
    with logprobs; where each token begins in `text`, in characters; negative if the token begins in
    the text of an earlier output.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_offsets: list[int] | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds on `time.monotonic`'s clock."""

    arrival_time: float
    first_token_time: float | None
    last_token_time: float
    first_scheduled_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request as its caller sees it.

    prompt_logprobs: None for the first token, which nothing predicts, then one entry per token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None


@dataclass(slots=True)
class BeamSearchSequence:
    """One of the likeliest sequences. tokens: the prompt's and the continuation's token ids."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The `beam_width` best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class EmbeddingOutput:
    """One prompt's vector. embedding: `hidden_size` floats, or `dimensions` if asked for."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """How well a document answers a query. score: higher is better."""

    score: float


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The vector of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(slots=True)
class ScoringRequestOutput:
    """The score of one pair of texts."""

    request_id: str
    outputs: ScoringOutput
    finished: bool = True


@dataclass(slots=True)
class Metric:
    """A measurement of the engine. name: vLLM's."""

    name: str
    labels: dict[str, str]


@dataclass(slots=True)
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass(slots=True)
class Gauge(Metric):
    """A number that goes up and down."""

    value: float
