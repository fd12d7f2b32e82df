"""A client's view of an engine that the owner, another process, shares among several clients."""

from __future__ import annotations

from collections.abc import Coroutine

import msgspec

from compiledllm.remote.admission import Load
from compiledllm.remote.client_link import OwnerLink
from compiledllm.remote.engine_requests import EngineRequests
from compiledllm.remote.errors import EngineError
from compiledllm.remote.limits import Limits
from compiledllm.remote.shared_table import SharedTable
from compiledllm.remote.shared_wire import (
    BeginTurn,
    EndTurn,
    EngineEnded,
    EngineNews,
    EngineReady,
    EngineReport,
    OfEngine,
    Relay,
    TurnsOver,
)
from compiledllm.remote.wire import Add, Finish, Ready, SetVocabulary, ToEngine, encoded

# Columns of the shared table for each engine: number of its requests, number of their prompt
# tokens, and number of the callers' requests, each of which may be several requests of the engine.
COLUMNS_PER_ENGINE = 3
MIN_QUIET_S = 5.0  # the owner reports every second, and may be silent for this long


class SharedEngine(EngineRequests):
    """The requests that this process sends to the owner's engine `number`.

    row: this process's row in `table`. name: unique among all present and earlier clients; the ids
    of this process's requests have it (`id_prefix`), so that no other client has the same ids.
    """

    def __init__(
        self, number: int, limits: Limits, link: OwnerLink, table: SharedTable, row: int, name: str
    ) -> None:
        self._number, self._link = number, link
        self._table, self._row = table, row
        super().__init__(limits)
        self.id_prefix = f"{name}."
        self.live.on_change = self._publish
        self.live.trial.take_turns(self._end_turn)
        self._generation = 0
        self._welcome: EngineReady | None = None  # of the running process; None: it has ended
        self._is_loading = False  # whether tokenizer and grammars are being loaded
        self._all_tried = False  # whether all clients have tried their suspects (`replay`)
        self._report: EngineReport | None = None  # the owner's last report
        self._num_quiet_s = 0  # seconds since the owner's last report

    def start(self) -> None:
        """Do nothing: the owner starts the engine."""

    async def stop(self) -> None:
        """Do nothing: the owner stops the engine."""

    async def wait_until_dead(self) -> None:
        while self.state != "dead":
            self._changed.clear()
            await self._changed.wait()

    # -- the owner's messages ------------------------------------------------------------------

    def take(self, message: OfEngine) -> Coroutine[None, None, None] | None:
        """Take a message of the owner.

        Returns a coroutine to run in the background if the message needs seconds of work.
        """
        if isinstance(message, EngineNews):
            self.live.take(message.news)
        elif isinstance(message, EngineReport):
            self._take_report(message)
        elif isinstance(message, EngineReady):
            return self._take_ready(message)
        elif isinstance(message, EngineEnded):
            self._take_end(message)
        elif message.generation == self._generation and isinstance(message, BeginTurn):
            self.live.trial.begin_turn()
        elif message.generation == self._generation and isinstance(message, TurnsOver):
            self._all_tried = True
            self.live.trial.finish()
        return None

    def _take_ready(self, message: EngineReady) -> Coroutine[None, None, None] | None:
        self._generation, self._welcome, self._all_tried = message.generation, message, False
        if self.requests is not None:
            self._become_ready(message.ready)
            return None
        if self._is_loading:
            return None
        self._is_loading = True
        return self._load(message)

    async def _load(self, message: EngineReady) -> None:
        await self._load_texts(message.ready)
        self._is_loading = False
        if self._welcome is not None and self._welcome.ready is not self.ready:
            self._become_ready(self._welcome.ready)

    def _become_ready(self, message: Ready) -> None:
        super()._become_ready(message)
        if self._all_tried:
            self.live.trial.finish()

    def _take_end(self, message: EngineEnded) -> None:
        self._welcome, self._generation = None, message.generation
        if self.state == "ready":
            self._set("loading")
        self.live.on_engine_end(message.cause, set(message.started))
        self.on_loss()

    def _take_report(self, message: EngineReport) -> None:
        self._report, self._num_quiet_s = message, 0
        self.num_restarts, self.failure = message.num_restarts, message.failure
        self.stats = message.stats
        if message.state in ("dead", "draining") and self.state not in ("dead", message.state):
            self._set(message.state)
            if message.state == "dead":
                cause = message.failure.error if message.failure else "the engine has ended"
                self.on_loss()
                self.live.end_all(EngineError(cause))

    def tick(self) -> None:
        """Note that a second has passed."""
        self._num_quiet_s += 1

    def why_unhealthy(self) -> str | None:
        if self._num_quiet_s > max(self._limits.stuck_s, MIN_QUIET_S):
            return f"the owner of the engine gave no sign of life for {self._num_quiet_s} s"
        return self._report.problem if self._report else None

    # -- requests ------------------------------------------------------------------------------

    @property
    def num_unread_bytes(self) -> int:
        of_engine = self._report.num_unread_bytes if self._report else 0
        return of_engine + self._link.num_unread_bytes

    @property
    def load(self) -> Load:
        first = COLUMNS_PER_ENGINE * self._number
        return Load(self._table.total(first), self._table.total(first + 1))

    @property
    def num_live(self) -> int:
        """The number of requests of all clients."""
        return self._table.total(COLUMNS_PER_ENGINE * self._number + 2)

    def _publish(self) -> None:
        first = COLUMNS_PER_ENGINE * self._number
        self._table.write(self._row, first, self.live.num_completions)
        self._table.write(self._row, first + 1, self.live.num_tokens)
        self._table.write(self._row, first + 2, len(self.live))

    def _end_turn(self) -> None:
        self._link.send(EndTurn(self._number, self._generation))

    def _send(self, message: ToEngine) -> None:
        relay = Relay(self._number, self._generation, msgspec.Raw(encoded(message)))
        if isinstance(message, Add):
            relay.opened = [message.spec.request_id]
        elif isinstance(message, Finish):
            relay.closed = message.request_ids
            relay.num_finished = len(relay.closed) if message.reason == "stop" else 0
        relay.is_vocabulary = isinstance(message, SetVocabulary)
        self._link.send(relay)
