"""Makes Triton's interpreter, which runs kernels without a GPU, faster and as exact as a GPU.

To run a kernel, the interpreter replaces the functions of `triton.language` during the launch. It
replaces them again at every call of a nested `@triton.jit` function, although they are already
replaced. It checks every sum and product of 32-bit integers for overflow, which GPUs do only with
`debug`. And for each value, it derives again the attributes that depend on dtype and shape only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def make_faster() -> None:
    """Skip the interpreter's repeated work. Results stay equal."""
    _replace_the_language_once()
    _check_no_overflow()
    _remember_dtypes_and_shapes()
    _broadcast_no_equal_shapes()
    _convert_no_equal_types()


def _replace_the_language_once() -> None:
    """Replace the language's functions at a function's first call only, not at every call."""
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


def _check_no_overflow() -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_dtypes_and_shapes() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    dtype_of = functools.cache(interpreter._get_np_dtype)

    def np_dtype(dtype: Any) -> Any:
        is_pointer = isinstance(dtype.scalar, tl.pointer_type)
        return np.dtype(np.uint64) if is_pointer else dtype_of(dtype.scalar)

    interpreter._get_np_dtype = np_dtype
    # Let constructors reuse the attributes that they derive from equal dtypes and shapes.
    _remember(
        tl.tensor,
        lambda handle, type: type.name,  # of a block with its shape
        ("numel", "shape"),
        lambda self, handle, type: self.__dict__.update(
            handle=handle, type=type, dtype=type.scalar
        ),
    )
    _remember(
        tl.block_type,
        lambda element_ty, shape: (element_ty.name, *shape),
        ("shape", "numel", "name"),
        lambda self, element_ty, shape: self.__dict__.update(element_ty=element_ty),
    )


def _remember(
    kind: Any, key_of: Callable[..., Any], derived: tuple[str, ...], set_given: Callable[..., None]
) -> None:
    """Let constructions of equal keys share the `derived` attributes, which nothing changes."""
    construct, known = kind.__init__, dict[Any, dict[str, Any]]()

    def init(self: Any, *given: Any) -> None:
        key = key_of(*given)
        found = known.get(key)
        if found is None:
            construct(self, *given)
            known[key] = {name: getattr(self, name) for name in derived}
        else:
            set_given(self, *given)
            self.__dict__.update(found)

    kind.__init__ = init


def _broadcast_no_equal_shapes() -> None:
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_if_unequal(self: Any, left: Any, right: Any) -> Any:
        are_blocks = left.type.is_block() and right.type.is_block()
        if are_blocks and [*left.type.shape] == [*right.type.shape]:
            return left, right
        return broadcast(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast_if_unequal


def _convert_no_equal_types() -> None:
    """Do not convert operands of equal types; a Python integer takes the other operand's type."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    convert, types = TritonSemantic.binary_op_type_checking_impl, {"int32", "int64", "fp32"}

    def convert_if_unequal(self: Any, left: Any, right: Any, *options: Any, **named: Any) -> Any:
        if isinstance(left, tl.tensor) and left.dtype.name in types:
            if isinstance(right, tl.tensor) and right.dtype.name == left.dtype.name:
                return self.broadcast_impl_value(left, right)
            if type(right) is int and -(2**31) <= right < 2**31:
                constant = self.scalar_constant(right, left.dtype)
                return self.broadcast_impl_value(left, constant)
        return convert(self, left, right, *options, **named)

    TritonSemantic.binary_op_type_checking_impl = convert_if_unequal


def make_conversions_exact() -> None:
    """Convert FP8 and bfloat16 as GPUs and torch do.

    The interpreter truncates to bfloat16. For FP8, it rounds ties away from zero and loses the
    carry.
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
