"""Sends a new engine the requests of an ended one, and finds a request that ends engines.

Requests that were running at the end are suspects. Suspects are tried one at a time: the next
suspect is sent once the last one has proved harmless, and all other requests follow. If the engine
ends in the meantime, the suspect that was sent last is the cause.

If several client processes share an engine, each client tries its suspects in its turn, and other
requests are sent once all clients have had their turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from compiledllm.remote.live_request import LiveRequest

# A suspect with this many tokens is harmless. One is not enough: it shows that the prompt can be
# computed, but not that the request can decode.
TOKENS = 3


class Replay:
    """Sends the requests of one client process to a new engine.

    send: sends a request to the engine. is_live: whether a client still waits for a request.
    Attributes: `on_trial` (the suspect that was sent last, until it proves harmless), `is_over`
    (whether new requests may be sent at once).
    """

    def __init__(
        self, send: Callable[[LiveRequest], None], is_live: Callable[[LiveRequest], bool]
    ) -> None:
        self._send, self._is_live = send, is_live
        self._suspects: deque[LiveRequest] = deque()
        self._others: list[LiveRequest] = []
        self.on_trial: LiveRequest | None = None
        self.is_over = True
        self._on_tried: Callable[[], None] | None = None
        self._has_turn = True

    def take_turns(self, on_tried: Callable[[], None]) -> None:
        """From now on, try suspects only after `begin_turn`, and call `on_tried` when done.

        Other requests then wait until `finish` is called.
        """
        self._on_tried, self._has_turn = on_tried, False

    def begin(self, suspects: Iterable[LiveRequest], others: Iterable[LiveRequest]) -> None:
        """Start the trials with a new engine. others: requests that are not suspects."""
        self._suspects, self._others = deque(suspects), list(others)
        self.on_trial, self.is_over = None, False
        self.go_on()

    def begin_turn(self) -> None:
        """Try the suspects, if there are any."""
        self._has_turn = True
        self.go_on()

    def stop(self) -> None:
        """Forget all requests that wait, because the engine has ended."""
        self._suspects.clear()
        self._others.clear()
        self.on_trial, self.is_over = None, True
        self._has_turn = self._on_tried is None

    def hold(self, live: LiveRequest) -> None:
        """Keep a new request until the suspects are done."""
        self._others.append(live)

    def go_on(self) -> None:
        """Send the next requests if possible. Called after each step until `is_over`."""
        if not self._has_turn:
            return
        if self.on_trial is not None and self._is_suspect(self.on_trial):
            return
        self.on_trial = None
        while self._suspects and self.on_trial is None:
            suspect = self._suspects.popleft()
            if self._is_live(suspect):
                self.on_trial = suspect
                self._send(suspect)
        if self.on_trial is None:
            self._end_turn()

    def _end_turn(self) -> None:
        if self._on_tried is None:
            self.finish()
        else:
            self._has_turn = False
            self._on_tried()

    def finish(self) -> None:
        """Send all requests that wait."""
        waiting = [*self._suspects, *self._others]
        self.stop()
        for live in waiting:
            if self._is_live(live):
                self._send(live)

    def _is_suspect(self, live: LiveRequest) -> bool:
        return self._is_live(live) and any(
            not completion.is_finished and len(completion.token_ids) < TOKENS
            for completion in live.state.completions
        )
