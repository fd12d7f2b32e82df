"""What all calls of an offline engine do: make requests, run them, abort them if a call is left."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from compiledllm.engine.forecast import forecast
from compiledllm.engine.interrupts import deferred_interrupt
from compiledllm.engine.prompts import Prompt, one_per_prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.shared_core import SharedCore
from compiledllm.outputs import RequestOutput
from compiledllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tqdm import tqdm


class Calls:
    """Runs the requests of each call on a core that concurrent calls share.

    forecasts: whether to log how long the first call with requests without max_tokens may take.
    """

    def __init__(self, requests: RequestFactory, shared: SharedCore, forecasts: bool) -> None:
        self._requests = requests
        self._shared = shared
        self._forecasts = forecasts
        self._request_ids = itertools.count()

    def make(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        waits_for_batch: bool = False,
    ) -> list[RequestState]:
        """One request per prompt. Raises ValueError for a bad prompt."""
        if sampling_params is None:
            sampling_params = self._requests.defaults
        params = one_per_prompt(sampling_params, len(prompts), "sampling_params")
        priorities = one_per_prompt(0 if priority is None else priority, len(prompts), "priority")
        return [
            self._requests.make(self.next_request_id(), *arguments, waits_for_batch=waits_for_batch)
            for arguments in zip(prompts, params, priorities, strict=True)
        ]

    def next_request_id(self) -> str:
        ids = map(str, self._request_ids)
        return next(request_id for request_id in ids if request_id not in self._shared.states)

    def run(
        self,
        states: list[RequestState],
        use_tqdm: bool | Callable[..., tqdm[Any]],
        is_batch: bool = False,
    ) -> list[RequestOutput]:
        """Step until `states` are finished.

        is_batch: the requests count as arriving together, those with the largest max_tokens first.
        """
        with self._aborting_on_exit(states), _progress_bar(len(states), use_tqdm) as progress:
            self._shared.add(_as_batch(states) if is_batch else states)
            with self._forecast(states):
                self._shared.run_until_finished(states, progress.update)
            return [state.output() for state in states]

    def stream(self, states: list[RequestState]) -> Generator[RequestOutput]:
        """Step until `states`, which are queued, are finished; yields outputs as they grow."""
        with self._aborting_on_exit(states):
            yield from self._shared.stream(states)

    def _forecast(self, states: list[RequestState]) -> contextlib.AbstractContextManager[None]:
        if not self._forecasts:
            return contextlib.nullcontext()
        self._forecasts = all(state.params.max_tokens is not None for state in states)
        return forecast(states, lambda: self._shared.num_generated)

    @contextlib.contextmanager
    def _aborting_on_exit(self, states: list[RequestState]) -> Iterator[None]:
        """End the requests if the block ends early (an error, Ctrl-C, a closed iterator)."""
        try:
            yield
        finally:
            self._shared.abort(states)


def _as_batch(states: list[RequestState]) -> list[RequestState]:
    """Let requests arrive together. Returns them, those with the most tokens to generate first."""
    arrival = min((state.arrival_time for state in states), default=0.0)
    for state in states:
        state.arrival_time = arrival

    def max_tokens(state: RequestState) -> float:
        is_open = state.params.max_tokens is None
        return math.inf if is_open else state.completions[0].spec.max_tokens

    return sorted(states, key=max_tokens, reverse=True)


def _progress_bar(
    total: int, use_tqdm: bool | Callable[..., tqdm[Any]]
) -> contextlib.AbstractContextManager[Any]:
    """A progress bar; without a terminal, an object whose `update` does nothing.

    A hidden tqdm bar would still take tqdm's lock. Ctrl-C in the middle of that would leave the
    lock taken, and every other thread would wait for it.
    """
    if not callable(use_tqdm) and not (use_tqdm and sys.stderr.isatty()):
        return contextlib.nullcontext(SimpleNamespace(update=lambda _: None))
    from tqdm import tqdm

    make = use_tqdm if callable(use_tqdm) else tqdm
    with deferred_interrupt():
        bar: contextlib.AbstractContextManager[Any] = make(
            total=total, desc="processed prompts", unit="prompt"
        )
    return bar
