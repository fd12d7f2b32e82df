"""The requests of one process to an engine: admits them, sends them, and follows their outputs.

Requests are `RequestState`s: this process makes text and checks stop strings, so that the engine's
process only runs steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.grammars.library import Vocabulary
from compiledllm.remote.admission import Load, check_admission
from compiledllm.remote.engine_state import EngineState
from compiledllm.remote.errors import EngineError, Unavailable
from compiledllm.remote.limits import Limits
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.live_requests import LiveRequests
from compiledllm.remote.served_text import load_vocabulary, make_request_factory
from compiledllm.remote.wire import Ready, ResetPrefixCache, SetVocabulary, ToEngine

MAX_UNREAD_BYTES = 2**24  # if the engine leaves more bytes unread, no request is admitted


class EngineRequests(EngineState, ABC):
    """Sends requests to an engine and follows them.

    Attributes: `requests` (the request factory, once the engine is ready), `live` (the requests in
    progress), `on_loaded` (called once, when tokenizer and grammars have been loaded in this
    process), `on_loss` (called after the engine has ended, before its requests fail or wait for its
    next start), `id_prefix` (part of the ids of this process's requests, to make them unique).
    """

    id_prefix = ""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.requests: RequestFactory | None = None
        self.on_loaded: Callable[[], None] = lambda: None
        self.on_loss: Callable[[], None] = lambda: None
        self.live = LiveRequests(self._send)
        self._vocabulary: Vocabulary | None = None  # None: no structured outputs

    @abstractmethod
    def start(self) -> None:
        """Start the engine in the background, if this process owns the engine."""

    @abstractmethod
    async def stop(self) -> None:
        """End the engine's process, whatever it is doing, if this process owns the engine."""

    @abstractmethod
    async def wait_until_dead(self) -> None:
        """Return once the engine has ended and will not be restarted."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Send a message to the engine's process, if there is one."""

    @property
    @abstractmethod
    def num_unread_bytes(self) -> int:
        """Bytes that the engine has not read yet."""

    @abstractmethod
    def why_unhealthy(self) -> str | None:
        """Why the engine cannot serve now; None: it can."""

    @property
    def load(self) -> Load:
        """The load of all requests that the engine has."""
        return Load(self.live.num_completions, self.live.num_tokens)

    # -- texts ---------------------------------------------------------------------------------

    async def _load_texts(self, message: Ready) -> None:
        """Load the tokenizer and the grammars' vocabulary, unless they have been loaded."""
        if self.requests is None:
            requests = await asyncio.to_thread(make_request_factory, message)
            self._vocabulary = await asyncio.to_thread(load_vocabulary, requests)
            self.requests = requests
            self.on_loaded()

    def _become_ready(self, message: Ready) -> None:
        """Give an engine that is ready what it has to know, and the unfinished requests."""
        if self._vocabulary is not None:
            self._send(SetVocabulary(self._vocabulary))
        self.ready = message
        self.live.replay()
        if self.state == "loading":
            self._set("ready")

    def share_texts(self, other: EngineRequests) -> None:
        """Use the tokenizer and grammars that the client of an equal engine has loaded."""
        if self.requests is None:
            self.requests, self._vocabulary = other.requests, other._vocabulary

    # -- requests ------------------------------------------------------------------------------

    def require_ready(self) -> RequestFactory:
        """The request factory. Raises Unavailable if the engine accepts no requests now."""
        if self.state != "ready" or self.requests is None:
            raise Unavailable(f"the engine is {self.state}", 1 if self.state == "draining" else 5)
        if reason := self.why_unhealthy():
            raise Unavailable(reason, 5)
        if self.num_unread_bytes > MAX_UNREAD_BYTES:
            raise Unavailable("the engine does not read the requests that were sent to it", 5)
        return self.requests

    def admit(self, states: list[RequestState]) -> list[LiveRequest]:
        """Admit all of these requests or none; the caller must follow or release each one.

        Raises Unavailable or Overloaded if no more requests are accepted now.
        """
        num_requests = sum(len(state.completions) for state in states)
        num_tokens = sum(c.spec.num_prompt_tokens for s in states for c in s.completions)
        self.check_admission(num_requests, num_tokens)
        admitted: list[LiveRequest] = []
        try:
            for state in states:
                admitted.append(self.live.add(state))
        except BaseException:
            self.release(admitted)
            raise
        return admitted

    def release(self, live_requests: list[LiveRequest]) -> None:
        """Abort the unfinished ones of these requests, because nobody waits for their output."""
        for live in live_requests:
            self.live.abort(live)

    def check_admission(self, num_requests: int, num_tokens: int) -> None:
        """Raise Unavailable or Overloaded for a temporary reason, ValueError for a permanent one.

        num_tokens: sum of the prompts' lengths, counted once per engine request.
        """
        self.require_ready()
        assert self.ready is not None
        check_admission(
            Load(num_requests, num_tokens),
            self.load,
            self._limits,
            max_num_seqs=int(self.ready.options["max_num_seqs"] or 1),
            num_waiting=self.stats.num_waiting if self.stats else 0,
        )

    def following(self, live: LiveRequest) -> contextlib.AbstractContextManager[None]:
        """A context for taking a request's outputs; leaving early aborts the request.

        Inside, `live.take` raises EngineError if the request fails, and DeadlineExceeded if the
        request takes longer than the limit, counted from here.
        """
        return self.live.following(live, self._limits.request_s)

    def reset_prefix_cache(self) -> None:
        """Let the engine forget all cached prefixes, before any request that is admitted later."""
        self._send(ResetPrefixCache())

    async def drain(self, timeout_s: float) -> None:
        """Admit no more requests; return when all are finished or `timeout_s` have passed."""
        self._set("draining")
        deadline = time.monotonic() + timeout_s
        while self.live and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.live.end_all(EngineError("the server is shutting down"))
