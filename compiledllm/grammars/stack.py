"""Runs calls in a thread with a given stack size, because llguidance recurses.

The recursion is as deep as the grammar is nested. The helper compiles a grammar first, with a
smaller stack than the processes that compile it again, so that only the helper can overflow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

TRIAL_BYTES = 2**23  # for the helper's first compilation
TRUSTED_BYTES = 2**27  # for grammars that the helper has compiled; address space, not memory
_lock = threading.Lock()


def call_with_stack(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread with a stack of `size` bytes; return or raise its outcome."""
    outcome: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function(*arguments))
        except BaseException as error:  # a library's panic is no Exception
            raised.append(error)

    with _lock:
        before = threading.stack_size(size)
        try:
            thread = threading.Thread(target=run, name="grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if raised:
        raise raised[0]
    return outcome[0]
