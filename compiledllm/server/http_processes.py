"""The HTTP processes of a server, in their owner: starts, watches, restarts and drains them.

Passes the processes' messages for engines to the hub, and adds up their metrics.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from compiledllm.log import log
from compiledllm.remote.engine_child import how_it_ended
from compiledllm.remote.hub import Hub
from compiledllm.remote.limits import Limits
from compiledllm.remote.restarts import Restarts
from compiledllm.remote.shared_table import SharedTable
from compiledllm.remote.shared_wire import AllMetrics, AskMetrics, Drain, MetricsReport, ToOwner
from compiledllm.remote.vital_signs import KILL_FACTOR
from compiledllm.remote.wire import Failed, WireError
from compiledllm.server.http_child import HttpChild
from compiledllm.server.owner_metrics import OwnerMetrics
from compiledllm.server.process_settings import ProcessSettings, ProcessState, state_column

MAX_UNREAD_BYTES = 2**28  # a process that leaves more of its messages unread is killed
METRICS_TIMEOUT_S = 1.0  # time limit for the processes to report their metrics when asked
END_TIMEOUT_S = 10.0  # time limit for a process to exit after the time to drain
MIN_KILL_S = 10.0  # a process may be silent for this long, whatever --stuck-timeout says
START_TIMEOUT_S = 300.0  # time limit for a process to import its libraries on a busy machine


@dataclass(eq=False, slots=True)
class _Question:
    """A request for the metrics of all processes. missing: processes that have not answered."""

    missing: set[HttpChild]
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, child: HttpChild) -> None:
        self.missing.discard(child)
        if not self.missing:
            self.answered.set()


class HttpProcesses:
    """Starts and watches `count` HTTP processes.

    settings_of: returns the settings of a process for its row in the table, its name and `is_late`.
    Attribute: `failure` (why a process cannot be kept running; None: all can).
    """

    def __init__(
        self,
        count: int,
        settings_of: Callable[[int, str, bool], ProcessSettings],
        hub: Hub,
        table: SharedTable,
        metrics: OwnerMetrics,
        limits: Limits,
    ) -> None:
        self.failure: Failed | None = None
        self._count, self._settings_of = count, settings_of
        self._hub, self._table, self._metrics = hub, table, metrics
        self._max_silent_s = max(KILL_FACTOR * limits.stuck_s, MIN_KILL_S)
        self._children: list[HttpChild] = []
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._keeping: list[asyncio.Task[None]] = []
        self._is_ending = False

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep all processes running. Returns once a process cannot be kept running (`failure`)."""
        self._keeping = [asyncio.create_task(self._keep(row)) for row in range(self._count)]
        done, _ = await asyncio.wait(self._keeping, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def states(self) -> list[ProcessState]:
        column = state_column(len(self._hub.engines))
        return [ProcessState(number) for number in self._table.column(column)]

    def _any_ready(self) -> bool:
        return ProcessState.READY in self.states()

    async def _keep(self, row: int) -> None:
        """Run the process of a row, and start it again whenever it ends.

        A wrong configuration is final if no process serves yet. Later, the reason may be a file
        that is just being replaced, so the process is started again.
        """
        restarts = Restarts()
        while True:
            await asyncio.sleep(restarts.delay_s)
            try:
                failure, was_ready = await self._run_one(row)
            except OSError as error:
                failure, was_ready = Failed(f"its process cannot be started ({error})"), False
            if self._is_ending:
                return
            if was_ready:
                restarts.note_success()
            if failure.is_config and not self._any_ready():
                self.failure = failure
                return
            if not restarts.note_crash(is_explained=False):
                self.failure = Failed(f"HTTP processes end again and again ({failure.error})")
                return
            log.error("HTTP process %d ended (%s); starting it again", row, failure.error)
            self._metrics.restarts.inc()

    async def _run_one(self, row: int) -> tuple[Failed, bool]:
        """Run one process to its end. Returns why it ended, and whether it had become ready."""
        settings = self._settings_of(row, str(next(self._numbers)), self._any_ready())
        child = await HttpChild.spawn(settings, self._table.fd)
        self._children.append(child)
        self._hub.connect(child.link)
        if self._is_ending:
            child.kill()
        try:
            await self._read_messages(child)
            status = await child.end()
        finally:
            self._children.remove(child)
            self._hub.disconnect(child.link)
            self._metrics.of_processes.retire(settings.name)
            for question in self._questions.values():
                question.note(child)
            was_ready = self.states()[row] is ProcessState.READY
            self._table.clear(row)
        return child.failure or Failed(how_it_ended(status)), was_ready

    async def _read_messages(self, child: HttpChild) -> None:
        """Take the process's messages until it ends."""
        try:
            while (message := await child.link.receive()) is not None:
                self._take(child, message)
        except WireError as error:
            log.error("killing an HTTP process: %s", error)
            child.kill()

    def sweep(self) -> None:
        """Kill processes that show no sign of life or do not read. Call this every second."""
        for child in self._children:
            child.num_silent_s += 1
            limit_s = self._max_silent_s if child.has_reported else START_TIMEOUT_S
            if child.num_silent_s > limit_s:
                log.error("killing an HTTP process: it gave no sign of life for %.0f s", limit_s)
                child.kill()
            elif child.link.num_unread_bytes > MAX_UNREAD_BYTES:
                log.error("killing an HTTP process: it does not read what it is sent")
                child.kill()

    async def drain(self, timeout_s: float) -> None:
        """Let all processes finish their requests for up to `timeout_s`, and end them."""
        self._is_ending = True
        for child in self._children:
            if self.states()[child.settings.row] is ProcessState.STARTING:
                child.kill()  # it has no requests, and may have much to import
            else:
                child.link.send(Drain(timeout_s))
        deadline = time.monotonic() + timeout_s + END_TIMEOUT_S
        while self._children and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for child in self._children:
            log.error("killing an HTTP process: it does not end")
            child.kill()
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    # -- messages ------------------------------------------------------------------------------

    def _take(self, child: HttpChild, message: ToOwner) -> None:
        if isinstance(message, MetricsReport):
            child.note_report()
            self._metrics.of_processes.put(child.settings.name, message.families)
            if (question := self._questions.get(message.number)) is not None:
                question.note(child)
        elif isinstance(message, AskMetrics):
            telling = asyncio.create_task(self._tell_metrics(child, message.number))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
        elif isinstance(message, Failed):
            child.failure = message
        else:
            self._hub.take(child.link, message)

    async def _tell_metrics(self, child: HttpChild, asked_as: int) -> None:
        """Send a process the metrics of all processes.

        A process that does not answer in time counts with its last report. asked_as: the number of
        the process's `AskMetrics` message.
        """
        number = next(self._numbers)
        question = self._questions[number] = _Question(set(self._children))
        try:
            for each in self._children:
                each.link.send(AskMetrics(number))
            async with asyncio.timeout(METRICS_TIMEOUT_S):
                await question.answered.wait()
        except TimeoutError:
            pass
        finally:
            del self._questions[number]
        self._metrics.set_processes(self.states())
        child.link.send(AllMetrics(asked_as, self._metrics.text()))
