"""All requests that clients wait for, updated from the engine's messages.

The core `Request`s here mirror those of the engine's process: tokens are appended as they arrive,
turned into text and checked for stop strings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.log import log
from compiledllm.outputs import FinishReason
from compiledllm.server.live_request import EngineError, LiveRequest
from compiledllm.server.replay import Replay
from compiledllm.server.wire import Finish, Grown, Stepped, ToEngine, add_of
from compiledllm.types import RequestStatus


class LiveRequests:
    """send: sends a message to the engine. num_tokens: sum of all prompts' tokens."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self.num_tokens = 0
        self.num_finished = 0  # requests that finished since the start
        self._replay = Replay(self._tell, self._is_live)
        self._lives: dict[str, LiveRequest] = {}  # by the caller's id
        self._completions: dict[str, tuple[LiveRequest, Completion]] = {}  # by the engine's id

    def __len__(self) -> int:
        return len(self._lives)

    def __iter__(self) -> Iterator[LiveRequest]:
        """Iterate over a copy, since requests may end during the iteration."""
        return iter(list(self._lives.values()))

    @property
    def num_completions(self) -> int:
        """The number of unfinished completions; each is one request of the engine."""
        return len(self._completions)

    @property
    def engine_ids(self) -> list[str]:
        return list(self._completions)

    def add(self, state: RequestState) -> LiveRequest:
        live = LiveRequest(state)
        self._put(live)
        try:
            if self._replay.is_over:
                self._tell(live)
            else:
                self._replay.hold(live)
        except BaseException:
            self.abort(live)
            raise
        return live

    def _put(self, live: LiveRequest) -> None:
        self._lives[live.state.request_id] = live
        self.num_tokens += live.num_tokens
        self._expect(live)

    def _tell(self, live: LiveRequest) -> None:
        """Send a request to the engine."""
        for completion in live.state.completions:
            self._send(add_of(completion.request))

    def _is_live(self, live: LiveRequest) -> bool:
        return self._lives.get(live.state.request_id) is live

    # -- the engine's end ----------------------------------------------------------------------

    def outlive(self, cause: str, started: set[str]) -> bool:
        """Fail or restart the requests of an ended engine; return whether any of them was running.

        A request that has shown output cannot restart. A request that was running when an engine
        ended gets a second engine but not a third, unless another request is found to be the cause.
        started: ids of all requests that the engine began to run.
        """
        replay = self._replay
        running = {live for live in self if _was_running(live, started)}
        found = replay.on_trial in running
        blamed = {live for live in running if live.ran_at_crash and replay.is_over}
        blamed |= {live for live in running if live is replay.on_trial}
        for live in self:
            if live.was_shown:
                self.end(live, EngineError(f"the engine ended: {cause}"))
            elif live in blamed:
                text = f"the engine ended, for the second time while it ran this request: {cause}"
                self.end(live, EngineError(text))
            else:
                live.ran_at_crash = not found and (live.ran_at_crash or live in running)
                self._start_over(live)
        replay.stop()
        return bool(running)

    def replay(self) -> None:
        """Give the unfinished requests to a new engine."""
        suspects = [live for live in self if live.ran_at_crash]
        self._replay.begin(suspects, [live for live in self if not live.ran_at_crash])

    def _start_over(self, live: LiveRequest) -> None:
        for completion in live.state.completions:
            completion.restart()
        self._expect(live)

    def _expect(self, live: LiveRequest) -> None:
        for completion in live.state.completions:
            self._completions[completion.request.request_id] = live, completion

    # -- tokens --------------------------------------------------------------------------------

    def book(self, step: Stepped) -> None:
        """Add a step's tokens to their requests and wake the clients that wait."""
        now, completions = time.monotonic(), self._completions
        for request_id, token_id in step.token_ids.items():
            if request_id in completions:
                live, completion = completions[request_id]
                try:
                    if self._push(completion, token_id, now):
                        self._settle(live, completion)
                except Exception as error:
                    self._give_up(live, error)
                live.wake()
        for news in step.grown:
            if news.request_id in completions:
                live, completion = completions[news.request_id]
                try:
                    self._grow(completion, news, now)
                    if completion.request.is_finished:
                        self._settle(live, completion)
                except Exception as error:
                    self._give_up(live, error)
                live.wake()
        if not self._replay.is_over:
            self._replay.go_on()

    def _settle(self, live: LiveRequest, completion: Completion) -> None:
        """Remove a finished completion, and with the last one its request."""
        del self._completions[completion.request.request_id]
        if live.state.is_finished:
            self.num_finished += 1
            self._forget(live)

    def _give_up(self, live: LiveRequest, error: Exception) -> None:
        """End a request whose tokens cannot be turned into text, so that all others go on."""
        log.error("request %s cannot go on", live.state.request_id, exc_info=error)
        self.expire(live, EngineError(f"{type(error).__name__}: {error}"))

    def _grow(self, completion: Completion, news: Grown, now: float) -> None:
        """Add a `Grown` message to a completion, up to a stop string."""
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
        """Add a token. Returns True if a stop string ended the completion; the engine is told."""
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
        """Remove a request, and tell the engine if it is unfinished."""
        ids = [c.request.request_id for c in live.state.completions if not c.request.is_finished]
        if ids and self._is_live(live):
            self._send(Finish(ids, "abort"))
        self._forget(live)

    def expire(self, live: LiveRequest, error: Exception) -> None:
        """End a request with an error and stop computing it, even if nobody reads the error."""
        try:
            self.abort(live)
        finally:
            live.fail(error)

    def end(self, live: LiveRequest, error: Exception) -> None:
        """End a request with an error that `take` raises after the remaining output."""
        live.fail(error)
        self._forget(live)

    def end_all(self, error: Exception) -> None:
        for live in self:
            self.end(live, error)

    def _forget(self, live: LiveRequest) -> None:
        if self._is_live(live):
            del self._lives[live.state.request_id]
            self.num_tokens -= live.num_tokens
        for completion in live.state.completions:
            pair = self._completions.get(completion.request.request_id)
            if pair is not None and pair[0] is live:
                del self._completions[completion.request.request_id]


def _was_running(live: LiveRequest, started: set[str]) -> bool:
    requests = [completion.request for completion in live.state.completions]
    return any(each.request_id in started and not each.is_finished for each in requests)


def _finish_mirror(
    completion: Completion, reason: FinishReason, stop_reason: int | str | None
) -> None:
    request = completion.request
    request.status = RequestStatus.FINISHED
    request.finish_reason, request.stop_reason = reason, stop_reason
