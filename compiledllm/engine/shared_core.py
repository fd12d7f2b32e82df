"""An `EngineCore` that is shared by concurrent calls, which take turns to run steps.

A step advances the requests of all calls. Each call gets the outputs and the failures of its own
requests.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

from compiledllm.engine.book import Book, Growth
from compiledllm.engine.core import EngineCore
from compiledllm.engine.counts import Counts
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.turns import Turns
from compiledllm.outputs import FinishReason, Metric, RequestOutput
from compiledllm.types import RequestUpdate, StepNews


class SharedCore:
    """`add` queues a call's requests; `run_until_finished` or `stream` then steps.

    Requests that are `is_for_step` belong to `step` instead, whichever thread calls it.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._book = Book()
        self._turns = Turns()
        self._unseen: dict[str, RequestState] = {}  # requests that grew since the last `step`
        self._failures: dict[str, Exception] = {}  # by request id: the error that ended it
        self._num_steps = 0
        self._num_ended = 0  # requests
        self._counts = Counts()

    @property
    def states(self) -> dict[str, RequestState]:
        """Live requests by id."""
        return self._book.states

    @property
    def num_generated(self) -> int:
        """Tokens generated since the start."""
        return self._counts.num_generated

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
                if self._book.is_open(state):
                    self._end(state)
                if self._unseen.get(state.request_id) is state:
                    del self._unseen[state.request_id]

        self._turns.run_soon(work)

    def abort_id(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        with self._turns.taken():
            self._failures.pop(request_id, None)
            self._unseen.pop(request_id, None)
            if request_id in self.states:
                self._end(self.states[request_id])

    def run_until_finished(
        self, states: list[RequestState], progress: Callable[[int], object]
    ) -> None:
        """Step until `states` are finished. progress: called with the number newly finished."""
        unfinished, seen = states, -1
        while unfinished:
            with self._turns.taken():
                if self._num_ended == seen:  # otherwise another call's step has ended requests
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
                if self._num_steps == seen:  # otherwise another call has run a step meanwhile
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

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, between two steps."""
        with self._turns.taken():
            self.core.reset_prefix_cache()

    def metrics(self, model: str) -> list[Metric]:
        """The counts since the start, and the state of the scheduler."""
        with self._turns.taken():
            return self._counts.metrics(model, self.core.scheduler)

    def shut_down(self) -> None:
        """End all requests; their calls raise."""
        with self._turns.taken():
            for state in list(self.states.values()):
                self._failures[state.request_id] = ValueError("the engine was shut down")
                self._end(state)

    # -- in a turn -------------------------------------------------------------------------------

    def _add(self, state: RequestState) -> None:
        self._book.open(state)
        for completion in state.completions:
            self.core.add(completion.spec, state.grammar)

    def _end(self, state: RequestState, reason: FinishReason = "abort") -> None:
        """End a live request, its unfinished completions with `reason`."""
        self._book.close(state)
        self._num_ended += 1
        for completion in state.completions:
            if not completion.is_finished:
                self.core.finish(completion.spec.request_id, reason)
                completion.end(reason)

    def _advance(self) -> None:
        """Run one step, and turn its tokens into text.

        An error that ended requests is kept, and raised by the calls that wait for these requests.
        """
        self._num_steps += 1
        try:
            news = self.core.step()
        except Exception as error:
            lost = self._book.core_ids - self.core.unfinished_ids
            if not lost:
                raise
            ended = [RequestUpdate(request_id, [], "error") for request_id in lost]
            growth = self._book.take(StepNews(updates=ended))
            self._failures |= {state.request_id: error for state in growth.grown}
            self._num_ended += 1  # makes waiting calls look for failures
        else:
            growth = self._book.take(news)
            self._counts.num_generated += news.num_tokens
        self._note(growth)
        self.core.check_when_idle()

    def _note(self, growth: Growth) -> None:
        """Finish stopped and failed requests in the core, and keep outputs for `step`."""
        for request_id in growth.stopped:
            self.core.finish(request_id, "stop")
        for state, failure in growth.failed:
            if self._book.is_open(state):
                self._failures[state.request_id] = failure
                self._end(state, "error")
                growth.grown.append(state)
        self._num_ended += len(growth.finished)
        self._counts.note_finished(growth.finished)
        for state in growth.grown:
            if state.is_for_step:
                self._unseen[state.request_id] = state

    def _raise_failure(self, states: Iterable[RequestState]) -> None:
        """Raise the error of a step that ended one of `states`, whichever call ran the step."""
        if self._failures:
            errors = [self._failures.pop(state.request_id, None) for state in states]
            for error in filter(None, errors):
                raise error
