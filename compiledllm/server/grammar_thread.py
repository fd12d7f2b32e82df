"""Grammars of arriving requests are compiled beside the engine's loop, in the order they came.

Only those that the server's helper process has compiled before come here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compiledllm.grammars.grammar import Grammars
from compiledllm.grammars.library import Vocabulary
from compiledllm.log import log
from compiledllm.server.wire import Add
from compiledllm.types import Grammar


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request whose grammar is compiled; or what is wrong with that."""

    add: Add
    grammar: Grammar | None = None
    error: str | None = None


class GrammarThread:
    """`put` gets each request once its grammar is there. on_start: called with an id before that.

    Meanwhile the client may leave: the loop forgets the request, and asks before it adds one. What
    is not an error of a grammar ends the thread, and with it the process (`Lifeline`).
    """

    def __init__(
        self,
        put: Callable[[Compiled], None],
        on_start: Callable[[Sequence[str]], None] = lambda request_ids: None,
    ) -> None:
        self._put, self._on_start = put, on_start
        self._work: queue.SimpleQueue[Vocabulary | Add] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="grammars", daemon=True).start()
        self._grammars: Grammars | None = None
        self._wanted: set[str] = set()  # request ids, from their arrival on

    def speak(self, vocabulary: Vocabulary) -> None:
        """Of the requests that come from now on."""
        self._work.put(vocabulary)

    def compile(self, message: Add) -> None:
        self._wanted.add(message.request_id)
        self._work.put(message)

    def forget(self, request_id: str) -> None:
        self._wanted.discard(request_id)

    def is_wanted(self, message: Compiled) -> bool:
        """Whether it has not been forgotten; asked once."""
        is_wanted = message.add.request_id in self._wanted
        self._wanted.discard(message.add.request_id)
        return is_wanted

    def _run(self) -> None:
        while True:
            work = self._work.get()
            if isinstance(work, Add):
                self._on_start([work.request_id])
                self._compile(work)
            else:
                self._prepare(work)

    def _prepare(self, vocabulary: Vocabulary) -> None:
        try:
            grammars = Grammars(vocabulary)
            _ = grammars.tokenizer  # made here and now, as it takes its time
            self._grammars = grammars
        except Exception as error:  # the server has made the same before
            log.error("no grammars: %s: %s", type(error).__name__, error)

    def _compile(self, message: Add) -> None:
        assert message.grammar is not None
        try:
            if self._grammars is None:
                raise ValueError("the vocabulary could not be taken over")
            compiled = Compiled(message, self._grammars.remake(message.grammar))
        except Exception as error:  # the server has checked; what it could not see ends here
            compiled = Compiled(message, error=f"{type(error).__name__}: {error}")
        self._put(compiled)
