"""Compiles kernels in threads, ahead of the steps that run them.

    with in_threads():
        with asking():
            step()  # asks for the step's kernels and launches none of them
        step()  # waits for each kernel

Without this module, a kernel is compiled when a step launches it for the first time, one kernel
after another, each in a second or two. Threads help because the compilers of Triton and CUDA
release Python's global interpreter lock most of the time.
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
# Attributes: `pool`, the thread pool of `in_threads`, and `is_asking`.
_of_thread = threading.local()


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
        _of_thread.pool = threads
        try:
            with AsyncCompileMode(_Compilers(threads), ignore_errors=True):
                yield
        finally:
            del _of_thread.pool


@contextmanager
def _switching_often() -> Iterator[None]:
    """A context in which threads wait 0.2 ms instead of 5 ms for the global interpreter lock.

    Each operator of torch, and each file operation of an import, releases the lock. While another
    thread runs Python code, the releasing thread would wait 5 ms (Python's default switch interval)
    to get the lock back.
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
    """The executor that Triton's `AsyncCompileMode` uses: compiles kernels and their launchers.

    Otherwise Triton would build a kernel's launcher at the kernel's first launch. Up to version
    3.6, that takes a C compiler half a second.
    """

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self._threads.submit(self._compile, compile_kernel)

    def _compile(self, compile_kernel: Callable[[], Any]) -> Any:
        from triton.backends.nvidia.driver import CudaLauncher

        kernel = compile_kernel()
        with suppress(Exception):  # the first launch builds the launcher again and raises the error
            CudaLauncher(kernel.src, kernel.metadata)
        return kernel


def _hash_compiler(threads: ThreadPoolExecutor) -> None:
    """Let a thread hash Triton's library, which would delay the first kernel by 0.4 s."""
    from triton.runtime import cache

    key: Any = getattr(cache, "triton_key", None)
    if hasattr(key, "cache_info"):  # not replaced yet
        cache.triton_key = threads.submit(key).result


def load_driver() -> None:
    """Load Triton's extension module that calls the CUDA driver; a cold start compiles it first."""
    from triton.runtime.driver import driver

    with suppress(Exception):  # the first kernel loads the module again and raises the error
        driver.active.utils  # noqa: B018


@contextmanager
def asking() -> Iterator[None]:
    """A context within `in_threads` in which the calling thread's launches only ask for kernels."""
    from triton.runtime.jit import JITFunction

    with _one_at_a_time:
        run = JITFunction.run

        def ask_or_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            return run(self, *args, grid=grid, warmup=warmup or is_asking(), **kwargs)

        # Other threads, which run other engines, call this method, too.
        JITFunction.run = ask_or_run
        _of_thread.is_asking = True
        try:
            yield
        finally:
            _of_thread.is_asking = False
            JITFunction.run = run


def is_asking() -> bool:
    """Whether the calling thread's launches only ask for kernels."""
    return getattr(_of_thread, "is_asking", False)


def ask(compile_kernel: Callable[[], object]) -> bool:
    """Within `asking`, let another thread call a function that compiles a kernel.

    The function must keep the kernel, or the error, for the code that launches the kernel. Outside
    `asking`, returns False without calling the function.
    """
    if not (is_asking() and hasattr(_of_thread, "pool")):
        return False
    _of_thread.pool.submit(compile_kernel)
    return True
