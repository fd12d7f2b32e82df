"""Prepares a process for many requests: its event loop, memory, garbage collector and exit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable

THREADS_TIMEOUT_S = 2.0  # time limit for working threads to finish when the process ends
YOUNG_OBJECTS = 20_000  # new objects between garbage collections; a request makes about a thousand
LARGE_BLOCK_BYTES = 2**20  # allocations from this size on are returned to the system when freed


def spare_collector() -> None:
    """Let the garbage collector skip all objects that exist now, and run less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def end_threads(status: int) -> None:
    """Wait for working threads, and exit the process at once if they do not finish in time.

    A thread may be busy with a long text or an import. status: the exit status.
    """
    ending = asyncio.create_task(asyncio.get_running_loop().shutdown_default_executor())
    _, unfinished = await asyncio.wait({ending}, timeout=THREADS_TIMEOUT_S)
    if unfinished:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_with_parent() -> None:
    """Let the kernel kill this process, even a stopped one, once its parent has ended (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_M_MMAP_THRESHOLD = -3
_PR_SET_PDEATHSIG = 1


def return_large_blocks() -> None:
    """Make glibc return the memory of large bodies to the system when it is freed.

    By default glibc raises its threshold for returning a block, up to 32 MiB, as large blocks are
    freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop factory if uvloop is installed: it writes to many sockets faster."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
