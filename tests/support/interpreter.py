"""Triton's interpreter, which runs the kernels where there is no GPU: less work for equal values.

To run a kernel the interpreter replaces the functions of `triton.language`: at a launch, until its
end, and again at every call of a `@triton.jit` function within, though nothing is left to replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


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


def make_conversions_exact() -> None:
    """Convert FP8 and bfloat16 as GPUs and torch do.

    The interpreter cuts bfloat16 off, and for FP8 it rounds ties away and forgets the carry.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
    }

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        both = {source, target}
        if not both & {tl.float8e4nv, tl.bfloat16} or not both <= dtypes.keys():
            return convert(data, source, target, rounding)
        bits = torch.from_numpy(np.frombuffer(bytearray(data.tobytes()), np.uint8))
        out = bits.view(dtypes[source]).to(dtypes[target]).view(torch.uint8)
        unsigned = getattr(np, f"uint{target.primitive_bitwidth}")
        return out.numpy().view(unsigned).reshape(data.shape)

    interpreter._convert_float = convert_float


def make_bf16_products_right() -> None:
    """Multiply bfloat16 as float32: the interpreter would multiply the bits as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return multiply(self, widened(a), widened(b), *arguments)

    interpreter.InterpreterBuilder.create_dot = create_dot
