"""Starts the engine's process, watches it, kills it if it hangs, and restarts it.

Subclasses decide what happens to requests: requests of this process (`EngineClient`) or of several
client processes (`shared_life`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.log import log
from compiledllm.remote.crash_records import tidy_crash_records, write_crash_record
from compiledllm.remote.engine_child import ENGINE_COMMAND, EngineChild, Spawn
from compiledllm.remote.engine_state import EngineState
from compiledllm.remote.errors import EngineError
from compiledllm.remote.limits import Limits
from compiledllm.remote.restarts import Restarts
from compiledllm.remote.vital_signs import VitalSigns
from compiledllm.remote.wire import (
    Alive,
    Failed,
    FromEngine,
    Ping,
    Ready,
    Start,
    StepOutputs,
    ToEngine,
    WireError,
)
from compiledllm.types import StepNews

STOP_S = 5.0  # time limit for a killed process to exit


class EngineLife(EngineState, ABC):
    """Starts the engine's process and watches it.

    options: the engine's options by name. crash_folder: where crash records are written. command:
    the command line of the process, to which two file descriptors are appended. environment:
    variables of the process besides this process's own. spawn: starts the process, on this machine
    or another one; see `EngineChild.spawn`. Attributes, besides those of `EngineState`: `signs`
    (the signs of life), `observe` (called with `Ready` and `StepOutputs` messages).
    """

    def __init__(
        self,
        options: dict[str, Any],
        limits: Limits,
        crash_folder: Path,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
        spawn: Spawn = EngineChild.spawn,
    ) -> None:
        super().__init__(limits)
        self._spawn = spawn
        self._options = options
        self._environment = environment
        self._crash_folder = crash_folder
        self._command = command
        self.observe: Callable[[FromEngine], None] = lambda message: None
        self.signs = VitalSigns(limits)
        self._child: EngineChild | None = None
        self._restarts = Restarts()
        self._num_finished_before = 0  # requests finished up to the last crash
        self._has_loaded = False  # whether a process has said that it is ready
        self._was_silent = False  # whether the process was killed because it was silent
        self._supervisor: asyncio.Task[None] | None = None

    # -- requests ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_live(self) -> int:
        """The number of requests that clients wait for."""

    @property
    @abstractmethod
    def _num_finished(self) -> int:
        """The number of requests that finished since the start."""

    @property
    @abstractmethod
    def _engine_ids(self) -> list[str]:
        """The engine's ids of the requests in progress."""

    @abstractmethod
    async def _welcome(self, message: Ready) -> None:
        """Send a ready engine its requests, and set the state."""

    @abstractmethod
    def _take_news(self, news: StepNews) -> None:
        """Take what a step did to requests."""

    @abstractmethod
    def _on_engine_end(self, cause: str, started: set[str]) -> bool:
        """Fail or keep the requests of an ended engine; return whether any of them was running.

        started: the engine's ids of all requests that the engine began to run.
        """

    def _give_requests_away(self) -> None:
        """Move requests that other engines can compute to these engines, if there are any."""

    @abstractmethod
    def _end_all(self, error: Exception) -> None:
        """End all requests with this error."""

    # -- life and death ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine in the background; `state` shows the progress."""
        tidy_crash_records(self._crash_folder)
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_until_dead(self) -> None:
        """Return once the engine has ended and will not be restarted."""
        assert self._supervisor is not None
        await asyncio.wait({self._supervisor})

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        if self._child is not None:
            self._child.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._child.end(), STOP_S)

    def kill(self, reason: str) -> None:
        """End the process and all requests at once, even if the event loop is closed."""
        if self._child is not None:
            self._child.kill()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            if self._supervisor is not None:
                self._supervisor.cancel()
            self._set("draining")
            self._end_all(EngineError(reason))

    def why_unhealthy(self) -> str | None:
        """Why the engine cannot serve now; None: it can."""
        if self.state == "dead":
            return self.failure.error if self.failure else "the engine has ended"
        reason = self.signs.why_unhealthy()
        return reason and f"{reason}, with {self.num_live} requests live"

    async def _supervise(self) -> None:
        try:
            await self._keep_running()
        except Exception as error:
            log.exception("the engine is lost")
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            is_config = isinstance(error, ConfigError)
            text = str(error) if is_config else f"{type(error).__name__}: {error}"
            self._give_up(Failed(text, is_config))

    async def _keep_running(self) -> None:
        goes_on = True
        while goes_on:
            await asyncio.sleep(self._restarts.delay_s)
            self.failure, self._was_silent = None, False
            started: set[str] = set()
            try:
                self._child = child = await self._spawn(self._command, self._environment)
            except OSError as error:
                self.failure = Failed(f"its process cannot be started ({error})")
            else:
                self.signs.begin()
                level = log.level or logging.INFO
                child.send(Start(self._options, str(self._crash_folder), level))
                await self._read_messages(child)
                how = await child.end()
                self.failure = self.failure or Failed(how)
                started = set(self.failure.blamed) or child.take_started()
            goes_on = self._handle_end(self.failure, started)

    async def _read_messages(self, child: EngineChild) -> None:
        """Read the process's messages until it ends, and kill the process if it hangs."""
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self._watch(child))]
            try:
                while (message := await child.receive()) is not None:
                    self.signs.hear(message)
                    if isinstance(message, Ready):
                        self._has_loaded = True  # even if the process ends before `_welcome` runs
                        self.observe(message)
                        beside.append(tasks.create_task(self._welcome(message)))
                    else:
                        self._handle(message)
            except WireError as error:
                self._kill(child, str(error))
            for task in beside:
                task.cancel()

    async def _watch(self, child: EngineChild) -> None:
        while True:
            await asyncio.sleep(self.signs.interval_s)
            self.signs.tick()
            child.send(Ping())
            reason = self.signs.why_lost()
            self._was_silent = reason is not None
            if self.signs.is_overdue:
                limit_s = self._limits.load_s
                reason = f"loading took longer than {limit_s:.0f} s (--load-timeout)"
            if reason is not None:
                self._kill(child, reason)
                return

    def _kill(self, child: EngineChild, reason: str) -> None:
        log.error("killing the engine's process: %s", reason)
        self.failure = Failed(reason)
        child.kill()

    def _handle_end(self, failure: Failed, started: set[str]) -> bool:
        """Handle the end of a process: its requests, the crash record, and `failure`.

        Returns whether to start another process.
        """
        if self._num_finished > self._num_finished_before:
            self._restarts.note_success()
        self._num_finished_before = self._num_finished
        if self._has_loaded and not failure.is_recorded:
            self._write_record(failure, started)
        is_explained = self._on_engine_end(failure.error, started)
        # An engine that never got ready would fail again, unless it was killed for its silence.
        may_load = self._has_loaded or self._was_silent
        if not may_load or not self._restarts.note_crash(is_explained):
            self._give_up(failure)
            return False
        if self.state == "draining" and not self.num_live:
            return False
        log.error("the engine ended (%s); starting it again", failure.error)
        self.num_restarts += 1
        if self.state != "draining":
            self._set("loading")
            self._give_requests_away()
        return True

    def _write_record(self, failure: Failed, started: set[str]) -> None:
        running = [{"request_id": name} for name in self._engine_ids if name in started]
        record: dict[str, object] = {"error": failure.error, "batch": running}
        record |= {"num_live": self.num_live, "last_stats": str(self.stats)}
        write_crash_record(self._crash_folder, record)

    def _give_up(self, failure: Failed) -> None:
        self.failure = failure
        self._set("dead")
        self._give_requests_away()
        self._end_all(EngineError(failure.error))

    # -- messages ------------------------------------------------------------------------------

    def _handle(self, message: StepOutputs | Failed | Alive) -> None:
        if isinstance(message, StepOutputs):
            self.observe(message)
            self.stats = message.stats
            self._take_news(message.news)
        elif isinstance(message, Failed):
            self.failure = message

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)
