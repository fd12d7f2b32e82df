"""Registers functions as torch ops. The compiler sees an op's schema only, not its code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

_LIBRARY: Any = torch.library.Library("compiledllm", "DEF")  # type: ignore[no-untyped-call]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def define(
    name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[_Function], _Function]:
    """Decorator that registers a function as `torch.ops.compiledllm.<name>` and returns the op.

    The schema is inferred from the function's annotations, which must be types that
    `torch.library.infer_schema` supports. fake: the compiler calls this function with the same
    arguments; it returns empty tensors of the result's shape and dtype. mutates: names of the
    parameters that the op writes in place.
    """

    def register(function: _Function) -> _Function:
        schema = torch.library.infer_schema(function, op_name=name, mutates_args=mutates)
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compiledllm::{name}", fake, lib=_LIBRARY)
        return cast("_Function", getattr(torch.ops.compiledllm, name))

    return register
