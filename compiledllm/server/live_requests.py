"""All requests that somebody waits for: what the engine tells is booked here.

Their core requests are mirrors: tokens arrive, text and stop strings are made of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.outputs import FinishReason
from compiledllm.server.live_request import LiveRequest
from compiledllm.server.wire import Finish, Grown, Stepped, ToEngine, add_of
from compiledllm.types import RequestStatus


class LiveRequests:
    """send: how the engine is told. num_tokens: of all their prompts."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self.num_tokens = 0
        self._lives: dict[str, LiveRequest] = {}  # by the caller's id
        self._completions: dict[str, tuple[LiveRequest, Completion]] = {}  # by the engine's id

    def __len__(self) -> int:
        return len(self._lives)

    def __iter__(self) -> Iterator[LiveRequest]:
        """Of those that are there now; they may be ended meanwhile."""
        return iter(list(self._lives.values()))

    @property
    def num_completions(self) -> int:
        """Each is a request of the engine's."""
        return len(self._completions)

    @property
    def engine_ids(self) -> list[str]:
        return list(self._completions)

    def add(self, state: RequestState) -> LiveRequest:
        live = LiveRequest(state)
        self._put(live)
        self.tell(live)
        return live

    def _put(self, live: LiveRequest) -> None:
        self._lives[live.state.request_id] = live
        self.num_tokens += live.num_tokens
        self._expect(live)

    def tell(self, live: LiveRequest) -> None:
        """Give a request to the engine."""
        for completion in live.state.completions:
            self._send(add_of(completion.request))

    def start_over(self, live: LiveRequest) -> None:
        """The engine that had it is gone; the next one is to be told."""
        live.was_replayed = True
        for completion in live.state.completions:
            completion.restart()
        self._expect(live)

    def _expect(self, live: LiveRequest) -> None:
        for completion in live.state.completions:
            self._completions[completion.request.request_id] = live, completion

    # -- tokens --------------------------------------------------------------------------------

    def book(self, step: Stepped) -> None:
        """A step's tokens; whoever waits for them is woken."""
        now, completions = time.monotonic(), self._completions
        for request_id, token_id in step.token_ids.items():
            if request_id in completions:
                live, completion = completions[request_id]
                if self._push(completion, token_id, now):
                    self._settle(live, completion)
                live.wake()
        for news in step.grown:
            if news.request_id in completions:
                live, completion = completions[news.request_id]
                self._grow(completion, news, now)
                if completion.request.is_finished:
                    self._settle(live, completion)
                live.wake()

    def _settle(self, live: LiveRequest, completion: Completion) -> None:
        """A completion is over, and with the last one the request."""
        del self._completions[completion.request.request_id]
        if live.state.is_finished:
            self._forget(live)

    def _grow(self, completion: Completion, news: Grown, now: float) -> None:
        """Book what came, up to a stop string."""
        request = completion.request
        request.num_cached_tokens = news.num_cached_tokens
        request.logprobs += news.logprobs
        request.prompt_logprobs += news.prompt_logprobs
        for index, token_id in enumerate(news.token_ids):
            if news.finish_reason and index == len(news.token_ids) - 1:
                _finish_mirror(completion, news.finish_reason, news.stop_reason)
            if self._push(completion, token_id, now):
                break
        if news.finish_reason and not request.is_finished:
            _finish_mirror(completion, news.finish_reason, news.stop_reason)

    def _push(self, completion: Completion, token_id: int, now: float) -> bool:
        """Book a token. True: a stop string ended the completion, and the engine knows."""
        request = completion.request
        request.token_ids.append(token_id)
        stop = completion.push_last_token(now)
        if stop is None:
            return False
        del request.logprobs[request.num_output_tokens :]
        if not request.is_finished:
            self._send(Finish([request.request_id], "stop"))
        _finish_mirror(completion, "stop", stop)
        return True

    # -- ends ----------------------------------------------------------------------------------

    def abort(self, live: LiveRequest) -> None:
        """If it is not over: free what it holds."""
        ids = [c.request.request_id for c in live.state.completions if not c.request.is_finished]
        if ids and self._lives.get(live.state.request_id) is live:
            self._send(Finish(ids, "abort"))
        self._forget(live)

    def expire(self, live: LiveRequest, error: Exception) -> None:
        """Its time is over: nothing more is computed for it, even if nobody reads."""
        self.abort(live)
        live.fail(error)

    def end(self, live: LiveRequest, error: Exception) -> None:
        """It fails, once what came before is taken."""
        live.fail(error)
        self._forget(live)

    def end_all(self, error: Exception) -> None:
        for live in self:
            self.end(live, error)

    def _forget(self, live: LiveRequest) -> None:
        if self._lives.get(live.state.request_id) is live:
            del self._lives[live.state.request_id]
            self.num_tokens -= live.num_tokens
        for completion in live.state.completions:
            pair = self._completions.get(completion.request.request_id)
            if pair is not None and pair[0] is live:
                del self._completions[completion.request.request_id]


def _finish_mirror(
    completion: Completion, reason: FinishReason, stop_reason: int | str | None
) -> None:
    request = completion.request
    request.status = RequestStatus.FINISHED
    request.finish_reason, request.stop_reason = reason, stop_reason
