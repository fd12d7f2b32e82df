"""Compilations that hold up requests, because they happen after a start has ended: there are none.

The set of kernels is closed at the end of a start. A later compilation is a fault of ours: it is
counted and logged, and with COMPILEDLLM_LATE_COMPILE=error, as in tests, it is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("compiledllm")

num_kernels = 0  # compiled late by Triton or NVRTC, in this process
_num_starting = 0


class LateCompile(RuntimeError):
    """Something was compiled while requests may wait, which this process does not allow."""


@contextmanager
def starting() -> Iterator[None]:
    """While the block runs, an engine of this process starts, and may compile."""
    global _num_starting
    _num_starting += 1
    try:
        yield
    finally:
        _num_starting -= 1


def note(kernel: str) -> None:
    """A kernel is being compiled."""
    global num_kernels
    if not _num_starting:
        num_kernels += 1
        report(f"the kernel {kernel}")


def report(what: str) -> None:
    """Something was compiled late. Raises LateCompile if this process does not allow it."""
    line = f"{what} was compiled after the start: this is a bug, please report it"
    if os.environ.get("COMPILEDLLM_LATE_COMPILE") == "error":
        raise LateCompile(line)
    log.warning("%s", line)


def watch_triton() -> None:
    """From now on, note what Triton compiles. Kernels from its cache are not compiled."""
    from triton import knobs

    if getattr(knobs.compilation.listener, "is_ours", False):
        return
    others = knobs.compilation.listener

    def listener(*, src: Any, cache_hit: bool, **facts: Any) -> None:
        if others is not None:
            others(src=src, cache_hit=cache_hit, **facts)
        if not cache_hit:
            note(str(getattr(src, "name", src)))

    listener.is_ours = True  # type: ignore[attr-defined]
    knobs.compilation.listener = listener
