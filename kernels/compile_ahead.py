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
_of_thread = threading.local()  # `pool`: of `in_threads`; `is_asking`


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

    with _one_at_a_time:
        run = JITFunction.run

        def ask_or_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            return run(self, *args, grid=grid, warmup=warmup or is_asking(), **kwargs)

        JITFunction.run = ask_or_run  # also of other threads, which run other engines
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

    The function must keep the kernel, or the error, for whoever launches the kernel. Returns False
    elsewhere, and calls nothing.
    """
    if not (is_asking() and hasattr(_of_thread, "pool")):
        return False
    _of_thread.pool.submit(compile_kernel)
    return True
