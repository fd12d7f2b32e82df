"""All requests that clients wait for: sends them to the engine, and collects their outputs.

A request is entered with `add`, grows with `take`, and leaves when it has finished, is aborted or
fails. After an engine has ended, the requests start over in the next engine, if they can.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator

from compiledllm.engine.book import Book
from compiledllm.engine.request_state import RequestState
from compiledllm.log import log
from compiledllm.remote.errors import DeadlineExceeded, EngineError
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.replay import Replay
from compiledllm.remote.wire import Add, Finish, ToEngine
from compiledllm.types import StepNews


class LiveRequests:
    """The requests that one process has in an engine. send: sends a message to the engine.

    Attributes: `num_tokens` (sum of all prompts' tokens), `on_change` (called when a request has
    been entered or has left), `trial` (sends a new engine the requests of the ended one).
    """

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self.on_change: Callable[[], None] | None = None
        self.num_tokens = 0
        self.num_finished = 0  # requests that finished since the start
        self.trial = Replay(self._send_request, self._is_live)
        self._book = Book()
        self._live_requests: dict[str, LiveRequest] = {}  # by the caller's id

    def __len__(self) -> int:
        return len(self._live_requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        """Iterate over a copy, since requests may end during the iteration."""
        return iter(list(self._live_requests.values()))

    def get(self, request_id: str) -> LiveRequest | None:
        return self._live_requests.get(request_id)

    @property
    def num_completions(self) -> int:
        """The number of unfinished completions; each is one request of the engine."""
        return len(self._book.core_ids)

    @property
    def engine_ids(self) -> list[str]:
        return list(self._book.core_ids)

    def add(self, state: RequestState) -> LiveRequest:
        """Enter a request and send it. Raises ValueError if its id is in use."""
        live = LiveRequest(state)
        self._enter(live)
        return live

    def _enter(self, live: LiveRequest) -> None:
        self._put(live)
        try:
            if self.trial.is_over:
                self._send_request(live)
            else:
                self.trial.hold(live)
        except BaseException:
            self.abort(live)
            raise

    def _put(self, live: LiveRequest) -> None:
        self._book.open(live.state)
        self._live_requests[live.state.request_id] = live
        self.num_tokens += live.num_tokens
        if self.on_change is not None:
            self.on_change()

    def _send_request(self, live: LiveRequest) -> None:
        """Send a request to the engine."""
        for completion in live.state.completions:
            self._send(Add(completion.spec))

    def _is_live(self, live: LiveRequest) -> bool:
        return self._live_requests.get(live.state.request_id) is live

    # -- when the engine has ended ---------------------------------------------------------------

    def on_engine_end(self, cause: str, started: set[str]) -> bool:
        """Fail or restart the requests of an ended engine; return whether any of them was running.

        A request that has shown output cannot restart. A request that was running when an engine
        ended gets a second engine but not a third, unless another request is found to be the cause.
        started: ids of all requests that the engine began to run.
        """
        replay = self.trial
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

    def give_away(self) -> list[LiveRequest]:
        """Let go of the requests that another engine may compute instead of an ended one.

        These are the requests that have shown no output, were not running when an engine ended, and
        have not been moved before.
        """
        found = [live for live in self if not (live.was_shown or live.ran_at_crash)]
        found = [live for live in found if not live.has_moved]
        for live in found:
            self._forget(live)
        return found

    def take_over(self, live: LiveRequest) -> None:
        """Enter and send a request that another engine's client has given away."""
        live.has_moved = True
        self._enter(live)

    def replay(self) -> None:
        """Send the unfinished requests to a new engine, suspects one by one (`Replay`)."""
        suspects = [live for live in self if live.ran_at_crash]
        self.trial.begin(suspects, [live for live in self if not live.ran_at_crash])

    def _start_over(self, live: LiveRequest) -> None:
        for completion in live.state.completions:
            completion.reset()
        self._book.expect(live.state)

    # -- tokens --------------------------------------------------------------------------------

    def take(self, news: StepNews) -> None:
        """Add a step's tokens to their requests and wake the clients that wait."""
        growth, live_requests = self._book.take(news), self._live_requests
        if growth.stopped:
            self._send(Finish(growth.stopped, "stop"))
        for state, error in growth.failed:
            if (live := live_requests.get(state.request_id)) is not None:
                self._give_up(live, error)
        for state in growth.grown:
            if (live := live_requests.get(state.request_id)) is not None:
                live.wake()
        for state in growth.finished:
            if (live := live_requests.get(state.request_id)) is not None:
                self.num_finished += 1
                self._forget(live)
        if not self.trial.is_over:
            self.trial.go_on()

    def _give_up(self, live: LiveRequest, error: Exception) -> None:
        """End a request whose tokens cannot be turned into text, so that all others go on."""
        log.error("request %s has failed", live.state.request_id, exc_info=error)
        self.expire(live, EngineError(f"{type(error).__name__}: {error}"))

    # -- ends ----------------------------------------------------------------------------------

    def abort(self, live: LiveRequest) -> None:
        """Remove a request, and tell the engine if it is unfinished."""
        ids = [c.spec.request_id for c in live.state.completions if not c.is_finished]
        if ids and self._is_live(live):
            self._send(Finish(ids, "abort"))
        self._forget(live)

    def end_as_aborted(self, live: LiveRequest) -> None:
        """End a request whose client still waits; its last output says "abort"."""
        self.abort(live)
        for completion in live.state.completions:
            if not completion.is_finished:
                completion.end("abort")
        live.wake()

    @contextlib.contextmanager
    def following(self, live: LiveRequest, limit_s: float) -> Iterator[None]:
        """Abort the request at the end of the context, and expire it after `limit_s` inside."""
        late = DeadlineExceeded(f"the request took longer than {limit_s:.0f} s")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(limit_s, self.expire, live, late) if limit_s < math.inf else None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self.abort(live)

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
        self._book.close(live.state)
        if self._is_live(live):
            del self._live_requests[live.state.request_id]
            self.num_tokens -= live.num_tokens
            if self.on_change is not None:
                self.on_change()


def _was_running(live: LiveRequest, started: set[str]) -> bool:
    return any(
        completion.spec.request_id in started and not completion.is_finished
        for completion in live.state.completions
    )
