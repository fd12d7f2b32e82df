"""Loads machine code with the CUDA driver and launches it. Imports no compiler.

`cuda_kernel` uses this module for code from NVRTC. `TritonBinary` launches code that Triton
compiled in an earlier process.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_WARP_SIZE = 32
# Triton's types of kernel parameters. A type that begins with "*" is a pointer.
_TYPES: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class CudaError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched."""


# `CUlaunchAttribute` of the driver's cuda.h.
class LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


# `CUlaunchConfig` of the driver's cuda.h.
class LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


# Programmatic dependent launch: the kernel may start before its predecessor has ended.
OVERLAP = LaunchAttribute(_STREAM_SERIALIZATION, b"", (ctypes.c_int * 16)(1))


def cluster_of(num_blocks: int) -> LaunchAttribute:
    """Consecutive thread blocks form clusters, each of which runs on neighbouring multiprocessors.

    num_blocks: 1 to 8; the grid's first dimension must be a multiple.
    """
    return LaunchAttribute(_CLUSTER_DIMENSION, b"", (ctypes.c_int * 16)(num_blocks, 1, 1))


def load(code: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """Load the kernel `name` of `code`, a cubin, on the current device. Raises CudaError.

    shared_bytes: dynamic shared memory of a thread block.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), code))
    check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    if shared_bytes:
        check(driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared_bytes))
    return function


class TritonBinary:
    """A kernel that Triton compiled, called as the modules that Inductor generates call kernels.

    `run(*arguments, stream)` launches the kernel. One thread at a time may launch.

    code: a cubin. entry: the kernel's name in the code. arguments: names of the arguments of `run`.
    parameters: (argument, Triton's type) for each argument that the machine code takes. grid: three
    Python expressions in the arguments, the number of thread blocks in each dimension. statements:
    Python statements that run before the expressions and define names for them. shared_bytes:
    dynamic shared memory of a thread block. overlap: whether the kernel may start before its
    predecessor has ended. Raises CudaError, or KeyError for a type that cannot be passed.
    """

    def __init__(
        self,
        code: bytes,
        *,
        entry: str,
        arguments: Sequence[str],
        parameters: Sequence[Sequence[str]],
        statements: Sequence[str],
        grid: Sequence[str],
        num_warps: int,
        shared_bytes: int,
        overlap: bool,
    ) -> None:
        self._function = load(code, entry, shared_bytes)
        self._values = [_slot(kind) for _, kind in parameters]
        # Triton's kernels end with two pointers to scratch memory, which these kernels do not use.
        scratch = [ctypes.c_void_p(), ctypes.c_void_p()]
        slots = [*self._values, *scratch]
        self._slots = slots  # the array below holds addresses only
        self._addresses = (ctypes.c_void_p * len(slots))(*map(ctypes.addressof, slots))
        self._config = LaunchConfig(
            (ctypes.c_uint * 3)(1, 1, 1),
            (ctypes.c_uint * 3)(_WARP_SIZE * num_warps, 1, 1),
            shared_bytes,
            None,
            ctypes.addressof(OVERLAP) if overlap else None,
            int(overlap),
        )
        self._config_address = ctypes.byref(self._config)
        self._launch_kernel = driver().cuLaunchKernelEx
        self.run = _launcher(self._launch, arguments, parameters, statements, grid)

    def _launch(self, x: int, y: int, z: int, stream: int, *values: Any) -> None:
        if not x * y * z:
            return
        for slot, value in zip(self._values, values, strict=True):
            slot.value = value
        config = self._config
        config.grid[0], config.grid[1], config.grid[2] = x, y, z
        config.stream = stream
        check(self._launch_kernel(self._config_address, self._function, self._addresses, None))


def _slot(kind: str) -> Any:
    return ctypes.c_void_p() if kind.startswith("*") else _TYPES[kind]()


def _launcher(
    launch: Callable[..., None],
    arguments: Sequence[str],
    parameters: Sequence[Sequence[str]],
    statements: Sequence[str],
    grid: Sequence[str],
) -> Callable[..., None]:
    """`run(*arguments, stream)`: computes the grid and calls `launch` with the parameters."""
    passed = (f"{n}.data_ptr()" if kind.startswith("*") else n for n, kind in parameters)
    lines = [
        f"def run({', '.join([*arguments, 'stream'])}):",
        *(f"    {statement}" for statement in statements),
        f"    launch({', '.join([*grid, 'stream', *passed])})",
    ]
    scope: dict[str, Any] = {"launch": launch}
    exec("\n".join(lines), scope)
    run: Callable[..., None] = scope["run"]
    return run


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def driver_version() -> int:
    """The newest version of CUDA that the driver supports: 13000 for 13.0. Raises CudaError."""
    version = ctypes.c_int()
    check(driver().cuDriverGetVersion(ctypes.byref(version)))
    return version.value


def check(status: int) -> None:
    """Raise CudaError for a status of the driver or of NVRTC other than success."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"CUDA reports {status}: {(text.value or b'unknown').decode()}")
