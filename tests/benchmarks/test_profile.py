"""Where a step's time goes, from events on a device."""

from __future__ import annotations

from compiledllm.benchmarks.profile import Event, between_steps, covered


def test_overlapping_events_count_once() -> None:
    assert covered([(5, 9), (0, 2), (1, 3), (6, 7)]) == 7


def test_idle_time_between_steps_leaves_out_the_copy_and_gaps_inside_a_step() -> None:
    events = [
        Event(0, 4, "a"),
        Event(6, 10, "b"),  # 2 idle inside the step
        Event(11, 12, "Memcpy DtoH (Device -> Pinned)"),
        Event(15, 20, "a"),
        Event(18, 22, "b"),
        Event(22, 23, "Memcpy DtoH (Device -> Pinned)"),
        Event(23, 24, "Memset"),
        Event(30, 31, "Memcpy DtoH (Device -> Pinned)"),
    ]
    assert between_steps(events) == [1 + 3, 0]
