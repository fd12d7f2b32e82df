"""Where a step's time goes: the device's work, and what the host adds to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

_TIMED_STEPS = 32
_STEPS = 8  # under the profiler


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step: the device at work, and the rest, in which it waits for the host."""

    device_s: float
    host_s: float


def measure_step(step: Callable[[], object], device: torch.device) -> StepTimes:
    """Run `step` 40 times: most of them timed, the rest under torch.profiler.

    Device time is that of the kernels on a GPU, and of tensor operators on a CPU. The profiler
    slows the host down, so the step's length comes from the runs without it. Those end as they
    began, with as many steps under way, or one would be counted twice.
    """
    seconds = _seconds(step)
    busy = min(_device_seconds(step, device), seconds)
    return StepTimes(device_s=busy, host_s=seconds - busy)


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        step()
    return (time.perf_counter() - start) / _TIMED_STEPS


def _device_seconds(step: Callable[[], object], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize(device)  # a step under way was not launched here
    with profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == wanted and (on_gpu or event.cpu_parent is None)
    ]
    return covered(events) / 1e6 / _STEPS


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total
