"""How long an engine has been silent, and how often it is started again."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

pytest.importorskip("msgspec")

from compiledllm.remote import crash_records, restarts, vital_signs
from compiledllm.remote.crash_records import tidy_crash_records, write_crash_record
from compiledllm.remote.limits import Limits
from compiledllm.remote.restarts import Restarts
from compiledllm.remote.running_log import RunningLog
from compiledllm.remote.vital_signs import VitalSigns
from compiledllm.remote.wire import Alive, Ready

READY = Ready({}, {}, "", 1, [], 1, {})


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(vital_signs.time, "monotonic", lambda: self.now)
        self.signs = VitalSigns(Limits(1, 1, 1, stuck_s=60, load_s=3600))

    def tick(self, times: int, seconds: float = 1.0, loop_silence_s: float | None = None) -> None:
        """loop_silence_s: at first, and growing; None: the process gives no answer."""
        for i in range(times):
            self.now += seconds
            self.signs.tick()
            if loop_silence_s is not None:
                self.signs.hear(Alive(loop_silence_s + i * seconds))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_silent_process_is_unhealthy_and_then_lost(clock: Clock) -> None:
    clock.signs.hear(READY)
    clock.tick(60)
    assert clock.signs.why_unhealthy() is None
    clock.tick(1)
    assert clock.signs.why_unhealthy() == "the engine's process gave no sign of life for 61 s"
    assert clock.signs.why_lost() is None
    clock.tick(60)
    assert clock.signs.why_lost() is not None
    clock.signs.hear(Alive(0.0))
    assert clock.signs.why_unhealthy() is None and clock.signs.silence_s == 0


@pytest.mark.parametrize("is_cpu, seconds", [(False, 120), (True, 600)])
def test_a_long_step_is_lost_later_on_a_cpu(is_cpu: bool, seconds: int, clock: Clock) -> None:
    clock.signs.hear(Ready({}, {}, "", 1, [], 1, {}, is_cpu=is_cpu))
    clock.tick(seconds, loop_silence_s=1.0)
    assert "no step was finished" in str(clock.signs.why_unhealthy())
    assert clock.signs.why_lost() is None
    clock.tick(2, loop_silence_s=seconds)
    assert clock.signs.why_lost() is not None


def test_loading_may_take_long_but_not_for_ever(clock: Clock) -> None:
    clock.tick(3600, loop_silence_s=None)
    clock.signs.hear(Alive(0.0))
    assert not clock.signs.is_overdue and clock.signs.why_unhealthy() is None
    clock.tick(1)
    assert clock.signs.is_overdue
    clock.signs.hear(READY)
    assert not clock.signs.is_overdue


def test_a_standstill_of_the_watcher_is_not_the_engines_silence(clock: Clock) -> None:
    clock.signs.hear(READY)
    clock.tick(1, seconds=10_000)
    assert clock.signs.why_unhealthy() is None
    clock.signs.hear(Alive(10_000.0))  # both were frozen: its clock went on
    assert clock.signs.why_unhealthy() is None


def test_a_process_that_loads_is_not_killed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.signs = VitalSigns(Limits(1, 1, 1, stuck_s=1))
    clock.tick(38, 0.25)
    assert clock.signs.why_unhealthy() is not None and clock.signs.why_lost() is None
    clock.tick(4, 0.25)
    assert clock.signs.why_lost() is not None


# -- restarts --------------------------------------------------------------------------------------


def test_crashes_that_no_request_explains_are_counted() -> None:
    found = Restarts()
    assert [found.note_crash(is_explained=False) for _ in range(6)] == [True] * 5 + [False]


def test_crashes_that_requests_explain_are_counted_apart_until_one_is_finished() -> None:
    found = Restarts()
    assert all(found.note_crash(is_explained=True) for _ in range(restarts.MAX_EXPLAINED_CRASHES))
    assert found.note_crash(is_explained=False) is True
    assert found.note_crash(is_explained=True) is False
    found.note_success()
    assert found.note_crash(is_explained=True) is True and found.delay_s == 0


def test_each_start_comes_later_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found, now, delays = Restarts(), 0.0, []
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    for _ in range(5):
        found.note_crash(is_explained=False)
        delays.append(found.delay_s)
    assert delays == [0, 0.5, 1, 2, 4]
    for _ in range(12):
        found.note_crash(is_explained=True)
    assert found.delay_s == 30
    now = restarts.WINDOW_S + 1
    assert Restarts.note_crash(found, is_explained=False) and len(found._unexplained) == 1


# -- records ---------------------------------------------------------------------------------------


def test_records_are_their_owners_and_expire(tmp_path: Path) -> None:
    folder = tmp_path / "crashes"
    folder.mkdir(mode=0o755)
    for age in range(40):
        path = folder / f"crash-{age:02}.json"
        path.write_text("{}")
        path.chmod(0o644)
        written = time.time() - age * 86_400 * 1.9
        os.utime(path, (written, written))
    (folder / "note.txt").write_text("another's")
    tidy_crash_records(folder)
    kept = sorted(path.name for path in folder.glob("crash-*"))
    assert kept == [f"crash-{age:02}.json" for age in range(16)]  # younger than 30 days
    written_now = [write_crash_record(folder, {"error": "x"}) for _ in range(9)]
    kept = sorted(path.name for path in folder.glob("crash-*"))
    assert len(kept) == crash_records.MAX_RECORDS == 20 and (folder / "note.txt").exists()
    assert all(path is not None and path.name in kept for path in written_now)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("crash-*")}
    assert modes == {0o600} and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_record_that_cannot_be_written_costs_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level("ERROR", logger="compiledllm"):
        assert write_crash_record(tmp_path / "file", {}) is None
    assert "cannot be written" in caplog.text


# -- what runs -------------------------------------------------------------------------------------


def test_the_log_of_running_requests_stays_small_and_keeps_who_runs() -> None:
    log = RunningLog.create()
    reader = RunningLog(os.dup(log.fd))
    log.note(["first", "of a client\nwith ö"])
    assert {"first", "of a client\nwith ö"} <= reader.read()
    for i in range(3000):
        log.note([f"{i}-{'x' * 1000}"])
        log.forget(f"{i}-{'x' * 1000}")
    assert "first" in reader.read() and os.fstat(log.fd).st_size < 2**20 + 2000
    log.close()
    reader.close()
