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
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

_MAX_THREADS = 16
_SWITCH_INTERVAL_S = 0.0002
_one_at_a_time = threading.Lock()  # for contexts that replace a method of Triton's class


@contextmanager
def in_threads() -> Iterator[None]:
    """A context in which the calling thread's kernels are compiled by other threads.

    A launch waits for its kernel. The end of the context waits for all kernels.
    """
    from triton import AsyncCompileMode

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with (
        _switching_often(),
        ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as threads,
    ):
        _hash_compiler(threads)
        with AsyncCompileMode(_Compilers(threads), ignore_errors=True):
            yield


@contextmanager
def _switching_often() -> Iterator[None]:
    """A context in which a thread asks sooner for Python's lock while another thread computes.

    Each operator of torch gives the lock away, and each file operation of an import. The thread
    would get the lock back after 5 ms, while another thread computes in Python.
    """
    before = sys.getswitchinterval()
    if before <= _SWITCH_INTERVAL_S:  # another engine is starting
        yield
        return
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Compilers:
    """Compiles kernels, and builds their launchers, as Triton's mode lets an executor do.

    Triton would build a launcher at the first launch of a kernel: up to version 3.6 with a C
    compiler, for half a second each.
    """

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self._threads.submit(self._compile, compile_kernel)

    def _compile(self, compile_kernel: Callable[[], Any]) -> Any:
        from triton.backends.nvidia.driver import CudaLauncher

        kernel = compile_kernel()
        with suppress(Exception):  # the first launch builds it again and reports the error
            CudaLauncher(kernel.src, kernel.metadata)
        return kernel


def _hash_compiler(threads: ThreadPoolExecutor) -> None:
    """Let a thread hash Triton's library, which takes 0.4 s before the first kernel."""
    from triton.runtime import cache

    key: Any = getattr(cache, "triton_key", None)
    if hasattr(key, "cache_info"):  # not replaced yet
        cache.triton_key = threads.submit(key).result


def load_driver() -> None:
    """Load Triton's module that calls the driver, which a cold start must compile first."""
    from triton.runtime.driver import driver

    with suppress(Exception):  # the first kernel loads the module again and reports the error
        driver.active.utils  # noqa: B018


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
