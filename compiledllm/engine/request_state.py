"""A request as its caller sees it: its completions so far, and what a stream shows of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator

from compiledllm.engine.detokenizer import Detokenizer
from compiledllm.engine.logprobs import LogprobList
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.types import Grammar, RequestSpec, RequestUpdate, TokenLogprobs


class Completion:
    """One output of a request: its `RequestSpec`, and the tokens and text generated so far.

    spec: the core's request. params: the caller's sampling parameters, of which only the fields
    about text are used. Attributes: `token_ids`, `logprobs` (of the output), `prompt_logprobs`,
    `num_cached_tokens`, `finish_reason`, `stop_reason`, `first_token_time`, `last_token_time`,
    `pooled` (the vector of a request that pools, float32).
    """

    def __init__(
        self, index: int, spec: RequestSpec, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.index = index
        self.spec = spec
        self._params = params
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Discard everything that was generated."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached_tokens = 0
        self.pooled: bytes | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        params, stream = self._params, None
        if self._tokenizer is not None and params.detokenize:
            prompt = self.spec.prompt_token_ids
            stream = self._tokenizer.stream(prompt, params.skip_special_tokens)
        elif params.stop_strings:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids instead")
        self._detokenizer = Detokenizer(stream, params)
        self._sum_of_logprobs, self._num_summed = 0.0, 0
        self._num_shown = self._num_chars_shown = 0  # tokens, characters shown by deltas
        self._end_shown = False

    # -- growing -------------------------------------------------------------------------------

    def push(self, token_id: int, now: float) -> str | None:
        """Add a token. Returns the stop string that the token completed, which ends the text."""
        self.token_ids.append(token_id)
        self.last_token_time = now
        if self.first_token_time is None:
            self.first_token_time = now
        is_hidden = self.finish_reason == "stop" and self._hides_end(token_id)
        stop = self._detokenizer.push(token_id, is_hidden)
        if stop is not None:  # a stop string wins over any other end by the same token
            self.end("stop", stop)
        return stop

    def _hides_end(self, token_id: int) -> bool:
        is_stop_token = token_id in self.spec.stop_token_ids
        return is_stop_token and not self._params.include_stop_str_in_output

    def apply(self, update: RequestUpdate, now: float) -> None:
        """Add an update's tokens and log probabilities, but none after a stop string."""
        self.num_cached_tokens = update.num_cached_tokens
        self.pooled = update.pooled
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        last = len(update.token_ids) - 1
        for index, token_id in enumerate(update.token_ids):
            if index == last and update.finish_reason:
                self.end(update.finish_reason, update.stop_reason)
            if self.push(token_id, now) is not None:
                del self.logprobs[len(self.token_ids) :]
                return
        if update.finish_reason:
            self.end(update.finish_reason, update.stop_reason)

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    # -- showing -------------------------------------------------------------------------------

    @property
    def cumulative_logprob(self) -> float | None:
        if not self.spec.sampling_params.wants_logprobs:
            return None
        new = self.logprobs[self._num_summed :]
        self._sum_of_logprobs += sum(logprobs[0] for _, logprobs, _, _ in new)
        self._num_summed += len(new)
        return self._sum_of_logprobs

    @property
    def has_news(self) -> bool:
        """Whether a delta would show anything new."""
        return len(self.token_ids) > self._num_shown or (self.is_finished and not self._end_shown)

    def output(self, index: int, shows_logprobs: bool, delta: bool = False) -> CompletionOutput:
        """The current state; with `delta`, only what is new since the last call with `delta`.

        A delta with log probabilities shows a token only once its text is final.
        """
        starts, is_finished = self._detokenizer.starts, self.is_finished
        text, first, end = self._detokenizer.visible_text(is_finished), 0, len(self.token_ids)
        length, text_start = len(text), 0
        if delta:
            self._end_shown = is_finished
            if shows_logprobs and not is_finished:
                end = self._detokenizer.num_visible_tokens(length)
            first, self._num_shown = self._num_shown, end
            text, text_start = text[self._num_chars_shown :], self._num_chars_shown
            self._num_chars_shown = length
        logprobs = offsets = None
        if shows_logprobs and starts is not None:
            logprobs = LogprobList(self.logprobs[first:end], text_of(self._tokenizer))
            offsets = [min(start, length) - text_start for start in starts[first:end]]
        return CompletionOutput(
            index,
            text,
            self.token_ids[first:end],
            self.cumulative_logprob,
            logprobs,
            self.finish_reason,
            self.stop_reason,
            offsets,
        )


class RequestState:
    """A live request as its caller sees it: `params.num_candidates` completions of one prompt.

    params: the caller's sampling parameters. prompt: the prompt's text, if known. Attributes:
    `grammar` (compiled from params.structured_outputs), `is_over`, `is_for_step`.
    """

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        completions: list[Completion],
        prompt: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.completions = completions
        self.prompt = prompt
        self.grammar: Grammar | None = None
        self.arrival_time = time.monotonic()
        self._first_scheduled_time: float | None = None
        self.is_for_step = False  # `add_request` made it; `step` returns its outputs
        self.params = params
        self._tokenizer = completions[0]._tokenizer
        self._is_choosing = len(completions) > params.n
        self._shows_end_only = (
            self._is_choosing or params.output_kind is RequestOutputKind.FINAL_ONLY
        )
        self._shows_deltas = params.output_kind is RequestOutputKind.DELTA and not self._is_choosing
        self._interval = params.stream_interval or 1
        self._shows_logprobs = params.wants_logprobs
        self._num_tokens_shown = 0
        self.is_over = False  # `next_output` has returned the last output

    @property
    def is_finished(self) -> bool:
        for completion in self.completions:  # noqa: SIM110 (`all` takes thrice as long)
            if completion.finish_reason is None:
                return False
        return True

    @property
    def is_due(self) -> bool:
        """Whether `output_kind` and `stream_interval` let a stream show an output now."""
        if not self._shows_end_only:
            num_new = self._num_tokens() - self._num_tokens_shown
            if num_new >= self._interval or (num_new and self._num_tokens_shown == 0):
                return True
        return self.is_finished and not self.is_over

    def next_output(self) -> RequestOutput | None:
        """The output that a stream shows now; None if no output is due."""
        if not self.is_due:
            return None
        self.is_over = self.is_finished
        self._num_tokens_shown = self._num_tokens()
        return self.output(self._shows_deltas)

    def _num_tokens(self) -> int:
        count = 0
        for completion in self.completions:
            count += len(completion.token_ids)
        return count

    def output(self, delta: bool = False) -> RequestOutput:
        """The current state; with `delta`, only what is new since the last call with `delta`."""
        first = self.completions[0]
        chosen = self._best() if self._is_choosing else self.completions
        if delta and len(chosen) > 1:
            chosen = [c for c in chosen if c.has_news] or chosen
        outputs: list[CompletionOutput] = []
        for rank, c in enumerate(chosen):
            index = rank if self._is_choosing else c.index
            outputs.append(c.output(index, self._shows_logprobs, delta))
        times = [c.last_token_time for c in self.completions if c.last_token_time is not None]
        return RequestOutput(
            self.request_id,
            self.prompt,
            first.spec.prompt_token_ids,
            outputs,
            self.is_finished,
            first.num_cached_tokens,
            RequestMetrics(
                self.arrival_time,
                first.first_token_time,
                max(times, default=self.arrival_time),
                self._first_scheduled_time,
            ),
            self._prompt_logprobs(),
        )

    def note_start(self, moment: float) -> None:
        """Note when a completion first got room in a step; later completions are ignored."""
        if self._first_scheduled_time is None:
            self._first_scheduled_time = moment

    def _best(self) -> list[Completion]:
        ordered = sorted(self.completions, key=lambda c: c.cumulative_logprob or 0.0, reverse=True)
        return ordered[: self.params.n]

    def _prompt_logprobs(self) -> LogprobList | None:
        if self.params.prompt_logprobs is None:
            return None
        found = self.completions[0].prompt_logprobs
        return LogprobList([None, *found], text_of(self._tokenizer))


def text_of(tokenizer: Tokenizer | None) -> Callable[[int], str] | None:
    """A function from token id to text; None without a tokenizer."""
    return None if tokenizer is None else tokenizer.token_text


class OutputStream(Iterator[RequestOutput]):
    """The iterator that `Engine.stream` returns; it can be closed before it has started."""

    def __init__(self, outputs: Generator[RequestOutput], abort: Callable[[], None]) -> None:
        self._outputs = outputs
        self._abort = abort

    def __next__(self) -> RequestOutput:
        return next(self._outputs)

    def close(self) -> None:
        """Abort the unfinished requests."""
        self._outputs.close()
        self._abort()

    __del__ = close
