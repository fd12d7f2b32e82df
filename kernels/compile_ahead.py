"""Compiles Triton kernels in threads, ahead of the steps that run them.

    with in_threads():
        with asking():
            step()  # asks for the step's kernels and launches none of them
        step()  # waits for each kernel

By itself, Triton compiles a kernel when a step launches it for the first time, one kernel after
another, each in about a second. Threads help because Triton's compiler releases Python's global
interpreter lock most of the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_MAX_THREADS = 16
_one_at_a_time = threading.Lock()  # for contexts that replace a method of Triton's class


@contextmanager
def in_threads() -> Iterator[None]:
    """A context in which the calling thread's kernels are compiled by other threads.

    A launch waits for its kernel. The end of the context waits for all kernels.
    """
    from triton import AsyncCompileMode

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as threads,
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        yield


@contextmanager
def asking() -> Iterator[None]:
    """A context within `in_threads` in which the calling thread's launches only ask for kernels."""
    from triton.runtime.jit import JITFunction

    thread = threading.get_ident()
    with _one_at_a_time:
        run = JITFunction.run

        def ask(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            warmup = warmup or threading.get_ident() == thread  # other threads run other engines
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        JITFunction.run = ask
        try:
            yield
        finally:
            JITFunction.run = run
