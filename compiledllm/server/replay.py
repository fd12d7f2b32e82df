"""Gives a new engine the requests that the old one had, so that one that kills engines is found.

Requests that were running are suspects. They are told one at a time, each once the one before it
has shown to be harmless, and only then all others. If the engine ends again meanwhile, the one that
was on trial is to blame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from compiledllm.server.live_request import LiveRequest

TOKENS = 3  # after which a request is harmless: the first one follows from its prompt


class Replay:
    """tell: gives a request to the engine. is_live: whether a request is still waited for.

    Attributes: `on_trial` (the suspect that was told last, while it is one).
    """

    def __init__(
        self, tell: Callable[[LiveRequest], None], is_live: Callable[[LiveRequest], bool]
    ) -> None:
        self._tell, self._is_live = tell, is_live
        self._suspects: deque[LiveRequest] = deque()
        self._others: list[LiveRequest] = []
        self.on_trial: LiveRequest | None = None
        self.is_over = True

    def begin(self, suspects: Iterable[LiveRequest], others: Iterable[LiveRequest]) -> None:
        """A new engine is ready."""
        self._suspects, self._others = deque(suspects), list(others)
        self.on_trial, self.is_over = None, False
        self.go_on()

    def stop(self) -> None:
        """The engine has ended."""
        self._suspects.clear()
        self._others.clear()
        self.on_trial, self.is_over = None, True

    def hold(self, live: LiveRequest) -> None:
        """A request that has come meanwhile."""
        self._others.append(live)

    def go_on(self) -> None:
        """After each step, until `is_over`."""
        if self.on_trial is not None and self._is_suspect(self.on_trial):
            return
        self.on_trial = None
        while self._suspects and self.on_trial is None:
            suspect = self._suspects.popleft()
            if self._is_live(suspect):
                self.on_trial = suspect
                self._tell(suspect)
        if self.on_trial is None:
            self.is_over, others, self._others = True, self._others, []
            for live in others:
                if self._is_live(live):
                    self._tell(live)

    def _is_suspect(self, live: LiveRequest) -> bool:
        requests = [completion.request for completion in live.state.completions]
        return self._is_live(live) and any(
            not request.is_finished and request.num_output_tokens < TOKENS for request in requests
        )
