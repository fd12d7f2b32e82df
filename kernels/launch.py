"""Facts about the GPU, and the launch options that depend on them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compiledllm.platform import can_overlap_kernels

HOPPER_SHARED_MEMORY = 227 * 1024  # bytes that a thread block may use, on compute capability 9.0


@functools.cache
def is_hopper() -> bool:
    """Whether the current device has compute capability 9.0, for which some kernels are made."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def num_multiprocessors() -> int:
    """The number of multiprocessors of the current device.

    1 in Triton's interpreter, which runs one program at a time.
    """
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def max_shared_memory() -> int:
    """Bytes of shared memory that a program may use on the current device.

    Unlimited in Triton's interpreter.
    """
    if not torch.cuda.is_available():
        return 2**30
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(torch.cuda.current_device())
    return int(properties["max_shared_mem"])


def out_of_resources() -> type[Exception]:
    """The exception that a launch raises if a program needs more than a multiprocessor has.

    A program may need too much shared memory or tensor memory, or too many threads.
    """
    from triton.runtime.errors import OutOfResources

    error: type[Exception] = OutOfResources
    return error


def stages_that_fit(num_stages: int, stage_bytes: int) -> int:
    """`num_stages` of a pipelined loop, or fewer, so that the GPU's shared memory holds them.

    stage_bytes: bytes of the tiles that an iteration loads.
    """
    return max(min(num_stages, max_shared_memory() // stage_bytes), 1)


@functools.cache
def launch_options() -> dict[str, bool]:
    """Keyword arguments of every launch. OVERLAP: whether programmatic dependent launch is used.

    With programmatic dependent launch, a kernel may start, and even load weights, before its
    predecessor ends. Every kernel must wait (`gdc_wait`) before it touches anything but weights,
    because its successor relies on all earlier kernels having finished.

    Inductor's kernels wait only for their immediate predecessor. A matmul therefore releases its
    successor only after its own wait, so that any kernel that starts after a matmul can rely on
    everything before that matmul having finished.
    """
    overlap = can_overlap_kernels()
    return {"OVERLAP": overlap, "launch_pdl": overlap}


def with_packed_heads(x: Tensor) -> Tensor:
    """`x` [tokens, heads, dim], or a copy, in which the heads of a token are contiguous.

    The token dimension may have any stride.
    """
    is_packed = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return x if is_packed else x.contiguous()
