"""Descriptions of tensors for the tensor memory accelerator of Hopper GPUs."""

from __future__ import annotations

import ctypes
import functools

import torch

from compiledllm.kernels.machine_code import check, driver

# Values of the driver's enums for `cuTensorMapEncodeTiled`.
_TYPES = {torch.uint8: 0, torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128B, _PROMOTE_256B = 3, 3


class TensorMap(ctypes.Structure):
    """`CUtensorMap`."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


@functools.lru_cache(maxsize=4096)
def encoded(
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> TensorMap:
    """The map of a tensor with five dimensions, the innermost first, for swizzled copies.

    dtype: 16 bits, or uint8 for any type of 8 bits. strides: of all dimensions but the innermost,
    in elements. box: sizes of what one copy reads, of 128 bytes in the innermost dimension.
    """
    memory = ctypes.create_string_buffer(128 + 63)
    made = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)  # 64-byte aligned
    check(
        driver().cuTensorMapEncodeTiled(
            ctypes.byref(made), _TYPES[dtype], 5, ctypes.c_void_p(address),
            (ctypes.c_uint64 * 5)(*sizes),
            (ctypes.c_uint64 * 4)(*(dtype.itemsize * stride for stride in strides)),
            (ctypes.c_uint32 * 5)(*box), (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1),
            0, _SWIZZLE_128B, _PROMOTE_256B, 0,
        )
    )  # fmt: skip
    return made
