"""Registers functions as ops of torch: opaque to the compiler, which sees their schema only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

_LIBRARY: Any = torch.library.Library("compiledllm", "DEF")  # type: ignore[no-untyped-call]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def define(
    name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[_Function], _Function]:
    """Decorator that replaces a function by the op `torch.ops.compiledllm.<name>` which runs it.

    The schema follows from the function's annotations, which must be types that
    `torch.library.infer_schema` knows. fake: called by the compiler with the same arguments;
    returns empty tensors of the result's shape and dtype. mutates: parameters written in place.
    """

    def register(function: _Function) -> _Function:
        schema = torch.library.infer_schema(function, op_name=name, mutates_args=mutates)
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compiledllm::{name}", fake, lib=_LIBRARY)
        return cast("_Function", getattr(torch.ops.compiledllm, name))

    return register
