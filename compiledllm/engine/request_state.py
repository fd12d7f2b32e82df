"""A request as its caller sees it: its text so far, its outputs, and the stream of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator

from compiledllm.engine.detokenizer import Detokenizer
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.types import CompletionOutput, Request, RequestMetrics, RequestOutput


class RequestState:
    """A live request as its caller sees it: the request and its text."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.is_for_step = False  # added by `add_request`, shown by `step`
        params = request.sampling_params
        stream = None
        if tokenizer is not None and params.detokenize:
            stream = tokenizer.stream(request.prompt_token_ids, params.skip_special_tokens)
        elif params.stop_strings:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids instead")
        self._detokenizer = Detokenizer(stream, params)
        self._last_token_time = request.arrival_time

    def push_last_token(self) -> str | None:
        """Take over the newest token; returns the stop string it completed, if any."""
        request = self.request
        self._last_token_time = time.monotonic()
        if request.first_token_time is None:
            request.first_token_time = self._last_token_time
        token_id = request.token_ids[-1]
        ended_by_token = request.finish_reason == "stop" and token_id in request.stop_token_ids
        hidden = ended_by_token and not request.sampling_params.include_stop_str_in_output
        return self._detokenizer.push(token_id, hidden)

    def output(self) -> RequestOutput:
        """The state now."""
        request = self.request
        completion = CompletionOutput(
            index=0,
            text=self._detokenizer.visible_text(request.is_finished),
            token_ids=request.output_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=request.is_finished,
            num_cached_tokens=max(request.num_cached_tokens, 0),
            metrics=RequestMetrics(
                request.arrival_time, request.first_token_time, self._last_token_time
            ),
        )


class OutputStream(Iterator[RequestOutput]):
    """What `Engine.stream` returns: an iterator that can be closed, started or not."""

    def __init__(self, outputs: Generator[RequestOutput], abort: Callable[[], None]) -> None:
        self._outputs = outputs
        self._abort = abort

    def __next__(self) -> RequestOutput:
        return next(self._outputs)

    def close(self) -> None:
        """Abort what is not finished."""
        self._outputs.close()
        self._abort()

    __del__ = close
