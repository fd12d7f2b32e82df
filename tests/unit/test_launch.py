"""What the server says of itself."""

from __future__ import annotations

import asyncio
import logging
import time
from unittest.mock import MagicMock

import pytest

pytest.importorskip("uvicorn")

from compiledllm.remote.engine_loop import EngineLoop
from compiledllm.server import http_server, launch
from compiledllm.types import StepNews


@pytest.mark.parametrize("standstill_s", [0.0, 0.3])
def test_a_standstill_of_the_event_loop_is_said(
    standstill_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "MAX_STANDSTILL_S", 0.1)

    async def run() -> None:
        watch = asyncio.create_task(http_server.watch_for_standstills())
        await asyncio.sleep(0.01)
        time.sleep(standstill_s)
        await asyncio.sleep(0.02)
        watch.cancel()

    with caplog.at_level(logging.WARNING, logger="compiledllm"):
        asyncio.run(run())
    said = [line for line in caplog.messages if "stood still" in line]
    assert len(said) == (1 if standstill_s else 0)


@pytest.mark.parametrize("step_s", [0.0, 0.2])
def test_a_slow_step_is_said(
    step_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = MagicMock(num_step_tokens=7)
    core.step.side_effect = lambda: time.sleep(step_s) or StepNews()
    loop = EngineLoop(core, MagicMock(), MagicMock())
    monkeypatch.setattr(loop, "_slow_s", 0.1)
    monkeypatch.setattr(loop, "_stats", lambda _step_s, _tokens: MagicMock())
    with caplog.at_level(logging.WARNING, logger="compiledllm"):
        loop._step()
    said = [line for line in caplog.messages if "a step took" in line]
    assert len(said) == (1 if step_s else 0)
    assert all("7 tokens" in line for line in said)


@pytest.mark.parametrize("what", ["told", "dead", "timer"])
def test_what_ends_the_server_and_how(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """A timer that fails would leave clients without their deadlines: that is an end, too."""

    async def forever() -> None:
        await asyncio.Event().wait()

    async def waited(task: asyncio.Task[None]) -> None:
        await task

    async def fail() -> None:
        raise RuntimeError("in a timer")

    async def end() -> int:
        ending = asyncio.Event()
        death = asyncio.create_task(asyncio.sleep(0) if what == "dead" else forever())
        engine = MagicMock(failure=None, wait_until_dead=lambda: waited(death))
        if what == "told":
            ending.set()
        serving = asyncio.create_task(forever())
        timer = asyncio.create_task(fail() if what == "timer" else forever())
        status = await launch._until_end(engine, ending, {serving, timer})
        serving.cancel()
        timer.cancel()
        return status

    with caplog.at_level(logging.ERROR, logger="compiledllm"):
        assert asyncio.run(end()) == (0 if what == "told" else 1)
    assert ("in a timer" in caplog.text) == (what == "timer")
