"""Splits the time of a step into device work and the host's share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

_TIMED_STEPS = 32
_STEPS = 8  # number of steps recorded by the profiler


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

    NUM_STEPS: ClassVar[int] = _TIMED_STEPS + _STEPS  # all that `of` runs

    step_s: float
    events: list[Event]
    num_recorded: int  # steps during which the events were recorded

    @classmethod
    def of(cls, step: Callable[[], object], device: torch.device) -> StepProfile:
        """Run `step` 40 times: most runs are timed, the others are recorded by torch.profiler."""
        step_s = _run_s(step)
        return cls(step_s, _device_events(step, device), _STEPS)

    def times(self) -> StepTimes:
        """How a step's time splits between the device and the host."""
        spans = ((e.start, e.end) for e in self.events)
        busy_s = min(covered(spans) / 1e6 / self.num_recorded, self.step_s)
        idle = between_steps(self.events)
        between_s = sum(idle) / 1e6 / len(idle) if idle else None
        return StepTimes(device_s=busy_s, host_s=self.step_s - busy_s, between_s=between_s)


def _run_s(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        step()
    return (time.perf_counter() - start) / _TIMED_STEPS


def _device_events(step: Callable[[], object], device: torch.device) -> list[Event]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize(device)  # a step in flight was launched before the profiler started
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
