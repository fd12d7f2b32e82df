"""Calls that may need a deep stack, or must not get one.

llguidance recurses as deep as a grammar is nested. What compiles a grammar for the first time has
less stack than what compiles it again, so that only the first can overflow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

TRIAL_BYTES = 2**23  # of the helper's threads
TRUSTED_BYTES = 2**27  # of those that take what the helper has compiled; address space, not memory
_lock = threading.Lock()


def call_with_stack(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """The result, or the exception, of a call in a thread with a stack of so many bytes."""
    outcome: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function(*arguments))
        except BaseException as error:  # a panic of a library is no Exception
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
