"""Splits the time of a step into device work and the host's share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

# Device -> (number of timed steps, number of steps that the profiler records). There are few on a
# CPU: its steps are long, and the profiler takes longer to read a step's operators than the step.
_NUM_STEPS = {"cuda": (32, 8), "cpu": (8, 2)}


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step: the device's busy time, and the rest, while the device waits for the host.

    between_s: idle time of a GPU between the last kernel of a step and the first kernel of the next
    one, which includes the profiler's overhead on the host. None on a CPU.
    """

    device_s: float
    host_s: float
    between_s: float | None


class Event(NamedTuple):
    """A kernel or operator on the device; start and end in microseconds."""

    start: float
    end: float
    name: str


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Steps of the same kind: the seconds of one, and what ran on the device during others.

    Events are kernels on a GPU, and tensor operators on a CPU. The profiler slows the host down, so
    the length of a step comes from the runs without the profiler. The timed runs end with as many
    steps in flight as they began with, so that no step counts twice.
    """

    step_s: float
    events: list[Event]
    num_recorded: int  # steps during which the events were recorded

    @classmethod
    def of(cls, step: Callable[[], object], device: torch.device) -> StepProfile:
        """Run `step` num_steps(device) times: most are timed, torch.profiler records the others."""
        num_timed, num_recorded = _NUM_STEPS[device.type]
        step_s = _run_s(step, num_timed)
        return cls(step_s, _device_events(step, device, num_recorded), num_recorded)

    def times(self) -> StepTimes:
        """How a step's time splits between the device and the host."""
        spans = ((e.start, e.end) for e in self.events)
        busy_s = min(covered(spans) / 1e6 / self.num_recorded, self.step_s)
        idle = between_steps(self.events)
        between_s = sum(idle) / 1e6 / len(idle) if idle else None
        return StepTimes(device_s=busy_s, host_s=self.step_s - busy_s, between_s=between_s)


def num_steps(device: torch.device) -> int:
    """The number of steps that `StepProfile.of` runs, timed and recorded ones together."""
    return sum(_NUM_STEPS[device.type])


def _run_s(step: Callable[[], object], num_timed: int) -> float:
    start = time.perf_counter()
    for _ in range(num_timed):
        step()
    return (time.perf_counter() - start) / num_timed


def _device_events(
    step: Callable[[], object], device: torch.device, num_recorded: int
) -> list[Event]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize(device)  # a step in flight was launched before the profiler started
    with profile(activities=activities) as profiler:
        for _ in range(num_recorded):
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
    """Idle time at each step's end, around the copy of its tokens to the host, in microseconds.

    events: sorted by start. The last step has no successor and gives no entry.
    """
    found, ended = [], 0.0
    for event, following in itertools.pairwise(events):
        if event.name.startswith("Memcpy DtoH"):
            found.append(max(event.start - ended, 0.0) + max(following.start - event.end, 0.0))
        ended = max(ended, event.end)
    return found


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total
