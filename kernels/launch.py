"""What Triton kernels need to know about the GPU they are launched on."""

from __future__ import annotations

import functools

import torch

from compiledllm.platform import can_overlap_kernels


@functools.cache
def num_multiprocessors() -> int:
    """Multiprocessors of the current device.

    1 in Triton's interpreter, which runs one program after the other.
    """
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def launch_options() -> dict[str, bool]:
    """Arguments of every launch. OVERLAP: whether a kernel may start before its predecessor ends.

    A kernel is then on the GPU, perhaps with its weights under way, when its inputs are ready. It
    must always wait (`gdc_wait`) before it touches anything but weights, because its successor
    relies on everything before it having finished.

    Inductor's kernels wait only for their immediate predecessor. A matmul therefore releases its
    successor only after its own wait, so that any kernel that starts after a matmul can rely on
    everything before that matmul having finished.
    """
    overlap = can_overlap_kernels()
    return {"OVERLAP": overlap, "launch_pdl": overlap}
