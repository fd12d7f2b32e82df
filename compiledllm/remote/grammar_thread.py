"""Compiles the grammars of arriving requests beside the engine's loop, in order of arrival.

Every grammar has been compiled before, by the helper process of the client.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compiledllm.grammars.grammar import Grammars
from compiledllm.grammars.library import Vocabulary
from compiledllm.log import log
from compiledllm.types import Grammar, RequestSpec


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request with its compiled grammar, or with the error of the compilation."""

    spec: RequestSpec
    grammar: Grammar | None = None
    error: str | None = None


class GrammarThread:
    """Calls `put` with each request once its grammar is compiled, and `on_start` before compiling.

    on_start: called with the request's id. The engine's loop calls `forget` if the client aborts
    the request meanwhile, and `is_wanted` before it adds the request. An exception other than a
    grammar's error ends the thread, and thereby the process (`Lifeline`).
    """

    def __init__(
        self,
        put: Callable[[Compiled], None],
        on_start: Callable[[Sequence[str]], None] = lambda request_ids: None,
    ) -> None:
        self._put, self._on_start = put, on_start
        self._work: queue.SimpleQueue[Vocabulary | RequestSpec] = queue.SimpleQueue()
        self._grammars: Grammars | None = None
        self._wanted: set[str] = set()  # request ids, until they are added or forgotten
        threading.Thread(target=self._run, name="grammars", daemon=True).start()

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the requests that follow."""
        self._work.put(vocabulary)

    def compile(self, spec: RequestSpec) -> None:
        self._wanted.add(spec.request_id)
        self._work.put(spec)

    def forget(self, request_id: str) -> None:
        self._wanted.discard(request_id)

    def is_wanted(self, message: Compiled) -> bool:
        """Whether the request has not been aborted. Call once per request."""
        is_wanted = message.spec.request_id in self._wanted
        self._wanted.discard(message.spec.request_id)
        return is_wanted

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if isinstance(work, RequestSpec):
                self._on_start([work.request_id])
                self._compile(work)
            else:
                self._prepare(work)

    def _prepare(self, vocabulary: Vocabulary) -> None:
        try:
            grammars = Grammars(vocabulary)
            _ = grammars.tokenizer  # built here because building takes up to seconds
            self._grammars = grammars
        except Exception as error:  # the client has already built the same tables without an error
            log.error("no grammars: %s: %s", type(error).__name__, error)

    def _compile(self, spec: RequestSpec) -> None:
        assert spec.grammar is not None
        try:
            if self._grammars is None:
                raise ValueError("llguidance could not read the vocabulary; see the log")
            compiled = Compiled(spec, self._grammars.remake(spec.grammar))
        except Exception as error:  # errors that the client's own compilation did not raise
            compiled = Compiled(spec, error=f"{type(error).__name__}: {error}")
        self._put(compiled)
