"""An engine whose requests come from several client processes, in the process that owns the engine.

The owner starts, watches and restarts the engine's process, passes the clients' messages on, and
sends each client the news of its own requests. Of a request, the owner knows only the id.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiledllm.remote.client_link import ClientLink
from compiledllm.remote.engine_child import ENGINE_COMMAND, EngineChild, Spawn
from compiledllm.remote.engine_life import EngineLife
from compiledllm.remote.engine_state import State
from compiledllm.remote.limits import Limits
from compiledllm.remote.shared_wire import (
    BeginTurn,
    EndTurn,
    EngineEnded,
    EngineNews,
    EngineReady,
    EngineReport,
    Relay,
    TurnsOver,
)
from compiledllm.remote.wire import Finish, Ready, framed
from compiledllm.types import StepNews


class SharedEngineLife(EngineLife):
    """number: the engine's number among the engines of this process. See `EngineLife`."""

    def __init__(
        self,
        number: int,
        options: dict[str, Any],
        limits: Limits,
        crash_folder: Path,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
        spawn: Spawn = EngineChild.spawn,
    ) -> None:
        super().__init__(options, limits, crash_folder, command, environment, spawn)
        self.number = number
        self._links: list[ClientLink] = []
        self._owners: dict[str, ClientLink] = {}  # of unfinished requests, by the engine's ids
        # Clients with suspects (requests that ran when an engine ended), in the order of their
        # turns.
        self._suspects: dict[ClientLink, None] = {}
        self._turns: deque[ClientLink] = deque()  # first the client that tries its suspects now
        self._is_up = False  # between an engine's `Ready` message and its end
        self._has_vocabulary = False
        self._num_ended_well = 0  # requests that finished without an error
        self._num_lost = 0  # requests that an engine's end left unfinished, until the next `Ready`

    # -- clients -------------------------------------------------------------------------------

    def connect(self, link: ClientLink) -> None:
        self._links.append(link)
        link.send(self._state_report())
        if self._is_up and self.ready is not None:
            link.send(EngineReady(self.number, self.num_restarts, self.ready))
            if not self._turns:
                link.send(TurnsOver(self.number, self.num_restarts))

    def disconnect(self, link: ClientLink) -> None:
        """Abort the requests of a client that has ended."""
        self._links.remove(link)
        self._suspects.pop(link, None)
        left = [name for name, owner in self._owners.items() if owner is link]
        for name in left:
            del self._owners[name]
        if left and self._is_up:
            self._send(Finish(left, "abort"))
        if link in self._turns:
            had_turn = self._turns[0] is link
            self._turns.remove(link)
            if had_turn:
                self._give_turn()

    def relay(self, link: ClientLink, message: Relay) -> None:
        """Pass a client's message on, unless the engine's process has ended meanwhile."""
        if message.generation != self.num_restarts or not self._is_up or self._child is None:
            return  # the client hears of the engine's end and sends its requests again
        if message.is_vocabulary:
            if self._has_vocabulary:  # all clients have the same
                return
            self._has_vocabulary = True
        for request_id in message.closed:
            self._owners.pop(request_id, None)
        self._num_ended_well += message.num_finished
        self._owners.update(dict.fromkeys(message.opened, link))
        self._child.send_frame(framed(message.message))

    def report(self) -> None:
        """Send the engine's state to all clients."""
        message = self._state_report()
        for link in self._links:
            link.send(message)

    def _state_report(self) -> EngineReport:
        return EngineReport(
            self.number,
            self.state,
            self.why_unhealthy(),
            self.num_restarts,
            0 if self._child is None else self._child.num_unread_bytes,
            self.stats,
            self.failure if self.state == "dead" else None,
        )

    def begin_draining(self) -> None:
        """From now on, restart the engine only if it has requests."""
        if self.state != "dead":
            self._set("draining")

    def _set(self, state: State) -> None:
        super()._set(state)
        self.report()

    # -- trials (`replay`) -----------------------------------------------------------------------

    def end_turn(self, link: ClientLink, message: EndTurn) -> None:
        """Note that a client has tried its suspects, and give the turn to the next client."""
        is_current = self._is_up and message.generation == self.num_restarts
        if is_current and self._turns and self._turns[0] is link:
            self._suspects.pop(self._turns.popleft(), None)
            self._give_turn()

    def _give_turn(self) -> None:
        """Let the next client try its suspects, or tell all clients that the trials are over."""
        if self._turns:
            self._turns[0].send(BeginTurn(self.number, self.num_restarts))
            return
        for link in self._links:
            link.send(TurnsOver(self.number, self.num_restarts))

    # -- requests ------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._owners) + self._num_lost

    @property
    def _num_finished(self) -> int:
        return self._num_ended_well

    @property
    def _engine_ids(self) -> list[str]:
        return list(self._owners)

    async def _welcome(self, message: Ready) -> None:
        self.ready = message
        self._is_up, self._has_vocabulary, self._num_lost = True, False, 0
        for link in self._links:
            link.send(EngineReady(self.number, self.num_restarts, message))
        self._turns = deque(self._suspects)
        self._give_turn()
        if self.state == "loading":
            self._set("ready")

    def _take_news(self, news: StepNews) -> None:
        shares = shares_of(news, self._owners)
        for update in news.updates:
            if update.finish_reason is not None:
                self._owners.pop(update.request_id, None)
                self._num_ended_well += update.finish_reason != "error"
        # The client whose turn it is needs a message after each step, even without news.
        if self._turns and self._turns[0] not in shares:
            shares[self._turns[0]] = StepNews()
        for link, share in shares.items():
            link.send(EngineNews(self.number, share))

    def _on_engine_end(self, cause: str, started: set[str]) -> bool:
        self._is_up = False
        ran: dict[ClientLink, list[str]] = {link: [] for link in self._links}
        for name in started:
            if name in self._owners:
                ran[self._owners[name]].append(name)
        for link, names in ran.items():
            link.send(EngineEnded(self.number, self.num_restarts + 1, cause, names))
            if names:
                self._suspects[link] = None
        self._num_lost += len(self._owners)
        self._owners.clear()
        self._turns.clear()
        return any(ran.values())

    def _end_all(self, error: Exception) -> None:
        """Forget all requests. Clients end their requests when they read the state "dead"."""
        self._num_lost = 0
        self._owners.clear()


def shares_of(news: StepNews, owners: Mapping[str, ClientLink]) -> dict[ClientLink, StepNews]:
    """Divide the news of a step by client. News of requests without an owner are left out."""
    shares: defaultdict[ClientLink, StepNews] = defaultdict(StepNews)
    for request_id, token_id in news.token_ids.items():
        if (link := owners.get(request_id)) is not None:
            shares[link].token_ids[request_id] = token_id
    for request_id, logprobs in news.logprobs.items():
        if (link := owners.get(request_id)) is not None:
            shares[link].logprobs[request_id] = logprobs
    for request_id, moment in news.started.items():
        if (link := owners.get(request_id)) is not None:
            shares[link].started[request_id] = moment
    for update in news.updates:
        if (link := owners.get(update.request_id)) is not None:
            shares[link].updates.append(update)
    return shares
