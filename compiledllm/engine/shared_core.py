"""An `EngineCore` shared by concurrent calls: turns to step, outputs and failures of each call.

A step advances the requests of all calls; each call looks only at its own requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable

from compiledllm.engine.core import EngineCore
from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.engine.turns import Turns
from compiledllm.outputs import RequestOutput


class SharedCore:
    """`add` queues a call's requests; `finish` or `stream` then steps until they have finished.

    Requests that are `is_for_step` belong to `step` instead, whichever thread calls it.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.states: dict[str, RequestState] = {}
        self._turns = Turns()
        self._completions: dict[str, tuple[RequestState, Completion]] = {}  # by Request.request_id
        self._unseen: dict[str, RequestState] = {}  # requests that grew since the last `step`
        self._failures: dict[str, Exception] = {}  # by request id: the error that ended it
        self._num_steps = 0
        self._num_ended = 0  # completions

    # -- calls -----------------------------------------------------------------------------------

    def add(self, states: list[RequestState]) -> None:
        """Queue requests, all or none. Raises ValueError for one that can never fit."""
        try:
            with self._turns.taken():
                for state in states:
                    self._add(state)
        except BaseException:
            self.abort(states)
            raise

    def abort(self, states: list[RequestState]) -> None:
        """End the unfinished requests of `states`, at the latest after the current step."""

        def work() -> None:
            for state in states:
                self._failures.pop(state.request_id, None)
                if self.states.get(state.request_id) is state:
                    self._end(state.request_id)

        self._turns.soon(work)

    def abort_id(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        with self._turns.taken():
            self._failures.pop(request_id, None)
            self._end(request_id)

    def finish(self, states: list[RequestState], progress: Callable[[int], object]) -> None:
        """Step until `states` are finished. progress: called with the number newly finished."""
        unfinished, seen = states, -1
        while unfinished:
            with self._turns.taken():
                if self._num_ended == seen:  # else another call's step has ended requests
                    self._advance()
                has_ended, seen = self._num_ended != seen, self._num_ended
            if has_ended:
                self._raise_failure(unfinished)
                still = [state for state in unfinished if not state.is_finished]
                progress(len(unfinished) - len(still))
                unfinished = still

    def stream(self, states: list[RequestState]) -> Generator[RequestOutput]:
        """Step until `states` are finished; yields the outputs that are due on the way."""
        unfinished, seen = states, -1
        while unfinished:
            with self._turns.taken():
                if self._num_steps == seen:  # else another call has stepped meanwhile
                    self._advance()
                seen = self._num_steps
                outputs = [state.next_output() for state in unfinished]
            self._raise_failure(unfinished)
            yield from (output for output in outputs if output is not None)
            unfinished = [state for state in unfinished if not state.is_over]

    def step(self) -> list[RequestOutput]:
        """One step, if there are requests. Returns the due outputs of `is_for_step` requests."""
        with self._turns.taken():
            if self.core.has_unfinished():
                self._advance()
            self._raise_failure(self._unseen.values())
            unseen, self._unseen = self._unseen, {}
            outputs = [state.next_output() for state in unseen.values()]
        return [output for output in outputs if output is not None]

    def has_more_for_step(self) -> bool:
        waiting = list(self.states.values())
        return bool(self._unseen) or any(state.is_for_step for state in waiting)

    # -- in a turn -------------------------------------------------------------------------------

    def _add(self, state: RequestState) -> None:
        if state.request_id in self.states:
            raise ValueError(f"request_id '{state.request_id}' is already in use")
        self.states[state.request_id] = state
        for completion in state.completions:
            self.core.add(completion.request)
            self._completions[completion.request.request_id] = state, completion

    def _end(self, request_id: str) -> None:
        state = self.states.pop(request_id, None)
        self._unseen.pop(request_id, None)
        for completion in () if state is None else state.completions:
            self.core.finish(completion.request.request_id, "abort")
            self._completions.pop(completion.request.request_id, None)
            self._num_ended += 1

    def _advance(self) -> None:
        """One engine step with its texts. An error that ended requests is kept for their calls."""
        self._num_steps += 1
        try:
            advanced = self.core.step()
        except Exception as error:
            ended = [pair for pair in self._completions.values() if pair[1].request.is_finished]
            if not ended:
                raise
            self._failures |= {state.request_id: error for state, _ in ended}
            self._book(ended)
            return
        pairs = [self._completions[request.request_id] for request in advanced]
        now = time.monotonic()
        for _, completion in pairs:
            self._push(completion, now)
        self.core.check_when_idle()
        self._book(pairs)

    def _push(self, completion: Completion, now: float) -> None:
        """Process a request's newest token; a failed request has none."""
        request = completion.request
        if request.finish_reason == "error":
            return
        stop = completion.push_last_token(now)
        if stop is not None and request.is_finished:  # by the same token: the string wins
            request.finish_reason, request.stop_reason = "stop", stop
        elif stop is not None:
            self.core.finish(request.request_id, "stop", stop)

    def _book(self, pairs: Iterable[tuple[RequestState, Completion]]) -> None:
        """Note the requests that `step` has to show, and drop finished requests."""
        for state, completion in pairs:
            if state.is_for_step:
                self._unseen[state.request_id] = state
            if completion.request.is_finished:
                del self._completions[completion.request.request_id]
                self._num_ended += 1
                if state.is_finished:
                    self.states.pop(state.request_id, None)

    def _raise_failure(self, states: Iterable[RequestState]) -> None:
        """Raise the error of a step that ended one of `states`, whichever call ran the step."""
        if self._failures:
            errors = [self._failures.pop(state.request_id, None) for state in states]
            for error in filter(None, errors):
                raise error
