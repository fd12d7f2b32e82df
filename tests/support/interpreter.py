"""Triton's interpreter, which runs the kernels where there is no GPU: less work for equal values.

To run a kernel the interpreter replaces the functions of `triton.language`: at a launch, until its
end, and again at every call of a `@triton.jit` function within, though nothing is left to replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def make_faster() -> None:
    """Replace the language at a launch, and at a function's first call for its own module."""
    from triton.runtime import InterpreterError, interpreter

    seen: set[Callable[..., Any]] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn not in seen:
            interpreter._patch_lang(function.fn)
            seen.add(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
