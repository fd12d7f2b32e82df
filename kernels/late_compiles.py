"""Detects late compilations: compilations after the start of an engine, which delay requests.

Every kernel is compiled during the start, so a late compilation is a bug of ours. Late compilations
are logged, and late kernels are counted. With COMPILEDLLM_LATE_COMPILE=error, as in tests, a
late compilation raises `LateCompile`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("compiledllm")

num_kernels = 0  # number of kernels that Triton or NVRTC compiled late, in this process
_num_starting = 0  # number of engines of this process that are starting
_has_started = False  # whether an engine of this process has started, or has failed to


class LateCompile(RuntimeError):
    """A late compilation in a process that does not allow late compilations."""


@contextmanager
def starting() -> Iterator[None]:
    """A context in which an engine of this process starts, so that no compilation is late."""
    global _num_starting, _has_started
    _num_starting += 1
    try:
        yield
    finally:
        _num_starting -= 1
        _has_started = True


def note(kernel: str) -> None:
    """Note that a kernel is being compiled. Counts and reports the kernel if that is late."""
    global num_kernels
    if _has_started and not _num_starting:
        num_kernels += 1
        report(f"the kernel {kernel}")


def report(what: str) -> None:
    """Report a late compilation of `what`. Raises LateCompile if this process allows none."""
    line = f"{what} was compiled after the start: this is a bug, please report it"
    if os.environ.get("COMPILEDLLM_LATE_COMPILE") == "error":
        raise LateCompile(line)
    log.warning("%s", line)


def watch_triton() -> None:
    """From now on, note each kernel that Triton compiles, but no kernel from Triton's cache."""
    from triton import knobs

    if getattr(knobs.compilation.listener, "is_ours", False):
        return
    others = knobs.compilation.listener

    def listener(*, src: Any, cache_hit: bool, **facts: Any) -> None:
        if others is not None:
            others(src=src, cache_hit=cache_hit, **facts)
        if not cache_hit:
            note(_described(src))

    listener.is_ours = True  # type: ignore[attr-defined]
    knobs.compilation.listener = listener


def _described(src: Any) -> str:
    """The kernel's name, constants and aligned parameters, for a report of a late compilation."""
    names = list(getattr(src, "signature", {}))
    constants = [f"{_name_of(names, k)}={v}" for k, v in getattr(src, "constants", {}).items()]
    aligned = [_name_of(names, key) for key in getattr(src, "attrs", {})]
    variant = ", ".join(constants) + "; divisible by 16: " + ", ".join(aligned)
    return f"{getattr(src, 'name', src)} ({variant[:300]})"


def _name_of(names: list[str], key: object) -> str:
    """The name of a parameter. key: Triton's key for the parameter, usually (its index,)."""
    return names[key[0]] if isinstance(key, tuple) and len(key) == 1 else str(key)
