"""Calls of several threads take turns with an engine, about in the order in which they come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compiledllm.engine.interrupts import deferred_interrupt


class Turns:
    """`with turns.taken()` is one thread at a time, and Ctrl-C waits for its end. Not reentrant."""

    def __init__(self) -> None:
        # A thread that leaves and comes again at once would always win a lone lock. Whoever waits
        # for the turn holds the gate, so the one that comes again waits behind.
        self._gate, self._turn = threading.Lock(), threading.Lock()
        self._postponed: deque[Callable[[], None]] = deque()

    @contextmanager
    def taken(self) -> Iterator[None]:
        with deferred_interrupt():
            with self._gate:
                self._turn.acquire()
            try:
                yield
            finally:
                self._do_postponed()
                self._turn.release()
                self._try_postponed()

    def soon(self, work: Callable[[], None]) -> None:
        """Do it in a turn: now if nobody has one, else at the end of the present one.

        Never waits. Finalizers need that: the garbage collector calls them from anywhere, also in
        a thread that has the turn.
        """
        self._postponed.append(work)
        self._try_postponed()

    def _try_postponed(self) -> None:
        while self._postponed and self._turn.acquire(blocking=False):
            try:
                with deferred_interrupt():
                    self._do_postponed()
            finally:
                self._turn.release()

    def _do_postponed(self) -> None:
        while self._postponed:
            self._postponed.popleft()()
