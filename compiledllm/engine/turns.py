"""Lets the threads that share an engine take turns, roughly in order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compiledllm.engine.interrupts import deferred_interrupt


class Turns:
    """`with turns.taken()` runs in one thread at a time and delays Ctrl-C. Not reentrant."""

    def __init__(self) -> None:
        # With a single lock, a thread that releases it and acquires it again at once would always
        # win. The thread that is next holds the gate, so the returning thread queues behind it.
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
                try:
                    self._do_postponed()
                finally:  # also after an error or a second Ctrl-C, since other threads wait
                    self._turn.release()
                self._try_postponed()

    def run_soon(self, work: Callable[[], None]) -> None:
        """Run `work` in a turn: now if no thread has the turn, else at the end of the current one.

        Never waits, so that finalizers may call it: the garbage collector may run a finalizer in
        the thread that has the turn.
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
