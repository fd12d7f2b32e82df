"""Where a step's time goes: the device's work, and what the host adds to it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

_TIMED_STEPS = 32
_STEPS = 8  # under the profiler


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step: the device at work, and the rest, in which it waits for the host.

    between_s: of a GPU, idle between the last kernel of a step and the first of the next; it has
    the host's slowness under the profiler in it. None on a CPU.
    """

    device_s: float
    host_s: float
    between_s: float | None


class Event(NamedTuple):
    """On the device, in microseconds."""

    start: float
    end: float
    name: str


def measure_step(step: Callable[[], object], device: torch.device) -> StepTimes:
    """Run `step` 40 times: most of them timed, the rest under torch.profiler.

    Device time is that of the kernels on a GPU, and of tensor operators on a CPU. The profiler
    slows the host down, so the step's length comes from the runs without it. Those end as they
    began, with as many steps under way, or one would be counted twice.
    """
    seconds = _seconds(step)
    events = _device_events(step, device)
    busy = min(covered((e.start, e.end) for e in events) / 1e6 / _STEPS, seconds)
    idle = between_steps(events)
    between = sum(idle) / 1e6 / len(idle) if idle else None
    return StepTimes(device_s=busy, host_s=seconds - busy, between_s=between)


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        step()
    return (time.perf_counter() - start) / _TIMED_STEPS


def _device_events(step: Callable[[], object], device: torch.device) -> list[Event]:
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
    return sorted(
        Event(event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type == wanted and (on_gpu or event.cpu_parent is None)
    )


def between_steps(events: Sequence[Event]) -> list[float]:
    """Idle time around each step's end: where its tokens are copied to the host, that copy aside.

    events: sorted. Nothing for the last step, which none follows.
    """
    found, ended = [], 0.0
    for event, following in itertools.pairwise(events):
        if event.name.startswith("Memcpy DtoH"):
            found.append(max(event.start - ended, 0.0) + max(following.start - event.end, 0.0))
        ended = max(ended, event.end)
    return found


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total
