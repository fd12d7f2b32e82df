"""What Triton kernels need to know of the GPU they are launched on."""

from __future__ import annotations

import functools

import torch

from compiledllm.platform import can_overlap_kernels


@functools.cache
def num_multiprocessors() -> int:
    """Of the current device; in the interpreter a few, enough to split work over."""
    if not torch.cuda.is_available():
        return 8
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def launch_options() -> dict[str, bool]:
    """Arguments of every launch: OVERLAP, whether the kernel may start before the one ahead ends.

    The kernel is then on the GPU, perhaps with its weights under way, when its inputs are ready. It
    waits (`gdc_wait`) before it touches anything but weights, always: its successor relies on
    everything before it being over.

    The compiler's kernels wait only for what the kernel right ahead of them wrote: what is older
    they may read before. So products let their successors start after their own wait: whatever
    starts behind one, everything ahead of it is over.
    """
    overlap = can_overlap_kernels()
    return {"OVERLAP": overlap, "launch_pdl": overlap}
