"""The book of live requests: takes the news of each step and turns tokens into text.

The same book serves an engine in this process (`SharedCore`) and an engine in another process
(`remote.live_requests`). It knows no scheduler and no connection: it says which requests the core
must end, and its owner tells the core.
"""

from __future__ import annotations

import time
from collections.abc import KeysView
from dataclasses import dataclass, field

from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.types import RequestUpdate, StepNews


@dataclass(slots=True)
class Growth:
    """What the news of a step mean for requests.

    grown: requests with new tokens or an end; a request with several completions may be listed
    several times. finished: requests whose last completion has ended; they have left the book.
    stopped: ids of the core's requests that the core must end, because a stop string has ended
    their text. failed: requests whose tokens cannot be decoded, with the error; the book's owner
    closes them.
    """

    grown: list[RequestState] = field(default_factory=list)
    finished: list[RequestState] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    failed: list[tuple[RequestState, Exception]] = field(default_factory=list)


class Book:
    """The live requests of one engine. states: by the caller's id."""

    def __init__(self) -> None:
        self.states: dict[str, RequestState] = {}
        # Unfinished completions, by the id of their request in the core.
        self._completions: dict[str, tuple[RequestState, Completion]] = {}

    @property
    def core_ids(self) -> KeysView[str]:
        """The ids of the core's requests, one for each unfinished completion."""
        return self._completions.keys()

    def open(self, state: RequestState) -> None:
        """Enter a request. Raises ValueError if its id, or one of its completions', is in use."""
        core_ids = (completion.spec.request_id for completion in state.completions)
        if state.request_id in self.states or any(i in self._completions for i in core_ids):
            raise ValueError(f"request_id '{state.request_id}' is already in use")
        self.states[state.request_id] = state
        self.expect(state)

    def expect(self, state: RequestState) -> None:
        """Expect news of all completions of a request, which starts or starts over."""
        for completion in state.completions:
            self._completions[completion.spec.request_id] = state, completion

    def close(self, state: RequestState) -> bool:
        """Remove a request: news of it are ignored from now on. False if it is not in the book."""
        for completion in state.completions:
            pair = self._completions.get(completion.spec.request_id)
            if pair is not None and pair[0] is state:
                del self._completions[completion.spec.request_id]
        is_here = self.is_open(state)
        if is_here:
            del self.states[state.request_id]
        return is_here

    def is_open(self, state: RequestState) -> bool:
        return self.states.get(state.request_id) is state

    def take(self, news: StepNews) -> Growth:
        """Add a step's tokens to their requests. News of requests not in the book are ignored."""
        growth, now, completions = Growth(), time.monotonic(), self._completions
        for request_id, moment in news.started.items():
            if request_id in completions:
                completions[request_id][0].note_start(moment)
        grown, logprobs = growth.grown, news.logprobs
        for request_id, token_id in news.token_ids.items():
            if request_id in completions:
                state, completion = completions[request_id]
                if logprobs and request_id in logprobs:
                    completion.logprobs.append(logprobs[request_id])
                try:
                    stop = completion.push(token_id, now)
                except Exception as error:
                    growth.failed.append((state, error))
                    continue
                grown.append(state)
                if stop is not None:
                    growth.stopped.append(request_id)
                    self._settle(state, request_id, growth)
        for update in news.updates:
            self._take_update(update, growth, now)
        return growth

    def _take_update(self, update: RequestUpdate, growth: Growth, now: float) -> None:
        request_id = update.request_id
        if request_id not in self._completions:
            return
        state, completion = self._completions[request_id]
        try:
            completion.apply(update, now)
        except Exception as error:
            growth.failed.append((state, error))
            return
        growth.grown.append(state)
        if completion.is_finished:
            if update.finish_reason is None:
                growth.stopped.append(request_id)
            self._settle(state, request_id, growth)

    def _settle(self, state: RequestState, request_id: str, growth: Growth) -> None:
        """Remove a finished completion, and with the last one its request."""
        del self._completions[request_id]
        if state.is_finished and self.close(state):
            growth.finished.append(state)
