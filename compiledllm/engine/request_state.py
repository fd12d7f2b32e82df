"""A request as its caller sees it: its completions so far, and what a stream shows of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from compiledllm.engine.detokenizer import Detokenizer
from compiledllm.engine.logprobs import LogprobList
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.types import Request, RequestStatus


class Completion:
    """One output of a request: the core's `Request` behind it, its text and log probabilities."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.request = request
        self._tokenizer = tokenizer
        self.restart()

    def restart(self) -> None:
        """Discard everything that was generated."""
        request, params = self.request, self.request.sampling_params
        request.token_ids = list(request.prompt_token_ids)
        request.logprobs, request.prompt_logprobs = [], []
        request.status = RequestStatus.WAITING
        request.finish_reason = request.stop_reason = request.first_token_time = None
        self.last_token_time = request.arrival_time
        stream = None
        if self._tokenizer is not None and params.detokenize:
            stream = self._tokenizer.stream(request.prompt_token_ids, params.skip_special_tokens)
        elif params.stop_strings:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids instead")
        self._detokenizer = Detokenizer(stream, params)
        self._sum_of_logprobs, self._num_summed = 0.0, 0
        self._num_shown = self._text_shown = 0  # tokens, characters shown by deltas
        self._end_shown = False

    def push_last_token(self, now: float) -> str | None:
        """Process the newest token; returns the stop string that the token completed, if any."""
        request = self.request
        self.last_token_time = now
        if request.first_token_time is None:
            request.first_token_time = now
        token_id = request.token_ids[-1]
        ended_by_token = request.finish_reason == "stop" and token_id in request.stop_token_ids
        hidden = ended_by_token and not request.sampling_params.include_stop_str_in_output
        return self._detokenizer.push(token_id, hidden)

    @property
    def cumulative_logprob(self) -> float | None:
        if not self.request.sampling_params.wants_logprobs:
            return None
        new = self.request.logprobs[self._num_summed :]
        self._sum_of_logprobs += sum(logprobs[0] for _, logprobs, _, _ in new)
        self._num_summed += len(new)
        return self._sum_of_logprobs

    @property
    def has_news(self) -> bool:
        """Whether a delta would show anything new."""
        request = self.request
        return request.num_output_tokens > self._num_shown or (
            request.is_finished and not self._end_shown
        )

    def output(self, index: int, shows_logprobs: bool, delta: bool = False) -> CompletionOutput:
        """The current state; with `delta`, only what is new since the last call with `delta`.

        A delta with log probabilities shows a token only once its text is final.
        """
        request, starts = self.request, self._detokenizer.starts
        is_finished, token_ids = request.is_finished, request.token_ids
        text, first, end = self._detokenizer.visible_text(is_finished), 0, request.num_output_tokens
        length, text_start = len(text), 0
        if delta:
            self._end_shown = is_finished
            if shows_logprobs and not is_finished:
                end = self._detokenizer.num_visible_tokens(length)
            first, self._num_shown = self._num_shown, end
            text, text_start, self._text_shown = text[self._text_shown :], self._text_shown, length
        logprobs = offsets = None
        if shows_logprobs and starts is not None:
            logprobs = LogprobList(request.logprobs[first:end], text_of(self._tokenizer))
            offsets = [min(start, length) - text_start for start in starts[first:end]]
        return CompletionOutput(
            index,
            text,
            token_ids[request.num_prompt_tokens + first : request.num_prompt_tokens + end],
            self.cumulative_logprob,
            logprobs,
            request.finish_reason,
            request.stop_reason,
            offsets,
        )


class RequestState:
    """A live request as its caller sees it: `params.num_candidates` completions of one prompt."""

    def __init__(
        self, request_id: str, params: SamplingParams, completions: list[Completion]
    ) -> None:
        self.request_id = request_id
        self.completions = completions
        self.is_for_step = False  # `add_request` made it; `step` returns its outputs
        self._params = params
        self._tokenizer = completions[0]._tokenizer
        self._is_choosing = len(completions) > params.n
        self._shows_end_only = (
            self._is_choosing or params.output_kind is RequestOutputKind.FINAL_ONLY
        )
        self._shows_deltas = params.output_kind is RequestOutputKind.DELTA and not self._is_choosing
        self._interval = params.stream_interval or 1
        self._shows_logprobs = params.wants_logprobs
        self._tokens_shown = 0
        self.is_over = False  # `next_output` has returned the last output

    @property
    def is_finished(self) -> bool:
        for completion in self.completions:  # noqa: SIM110 (`all` takes thrice as long)
            if completion.request.status is not RequestStatus.FINISHED:
                return False
        return True

    @property
    def is_due(self) -> bool:
        """Whether `output_kind` and `stream_interval` let a stream show an output now."""
        if not self._shows_end_only:
            num_new = self._num_tokens() - self._tokens_shown
            if num_new >= self._interval or (num_new and self._tokens_shown == 0):
                return True
        return self.is_finished and not self.is_over

    def next_output(self) -> RequestOutput | None:
        """The output that a stream shows now; None if no output is due."""
        if not self.is_due:
            return None
        self.is_over = self.is_finished
        self._tokens_shown = self._num_tokens()
        return self.output(self._shows_deltas)

    def _num_tokens(self) -> int:
        count = 0
        for completion in self.completions:
            count += completion.request.num_output_tokens
        return count

    def output(self, delta: bool = False) -> RequestOutput:
        """The current state; with `delta`, only what is new since the last call with `delta`."""
        first = self.completions[0].request
        chosen = self._best() if self._is_choosing else self.completions
        if delta and len(chosen) > 1:
            chosen = [c for c in chosen if c.has_news] or chosen
        outputs: list[CompletionOutput] = []
        for place, c in enumerate(chosen):
            index = place if self._is_choosing else c.index
            outputs.append(c.output(index, self._shows_logprobs, delta))
        last_time = max([c.last_token_time for c in self.completions])
        return RequestOutput(
            self.request_id,
            first.prompt,
            first.prompt_token_ids,
            outputs,
            self.is_finished,
            max(first.num_cached_tokens, 0),
            RequestMetrics(first.arrival_time, first.first_token_time, last_time),
            self._prompt_logprobs(),
        )

    def _best(self) -> list[Completion]:
        ordered = sorted(self.completions, key=lambda c: c.cumulative_logprob or 0.0, reverse=True)
        return ordered[: self._params.n]

    def _prompt_logprobs(self) -> LogprobList | None:
        if self._params.prompt_logprobs is None:
            return None
        found = self.completions[0].request.prompt_logprobs
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
