"""All engines of a process, and the processes that send them requests."""

from __future__ import annotations

from collections.abc import Sequence

from compiledllm.remote.client_link import ClientLink
from compiledllm.remote.shared_life import SharedEngineLife
from compiledllm.remote.shared_wire import EndTurn, Relay, Routed


class Hub:
    """engines: numbered from 0, not yet started."""

    def __init__(self, engines: Sequence[SharedEngineLife]) -> None:
        self.engines = engines
        self._links: list[ClientLink] = []

    def connect(self, link: ClientLink) -> None:
        """Let a client send requests."""
        self._links.append(link)
        for engine in self.engines:
            engine.connect(link)

    def disconnect(self, link: ClientLink) -> None:
        """Abort the requests of a client that has ended."""
        self._links.remove(link)
        for engine in self.engines:
            engine.disconnect(link)

    def take(self, link: ClientLink, message: Relay | EndTurn | Routed) -> None:
        """Take a client's message."""
        if isinstance(message, Relay):
            self.engines[message.engine].relay(link, message)
        elif isinstance(message, EndTurn):
            self.engines[message.engine].end_turn(link, message)
        else:
            for other in self._links:
                if other is not link:
                    other.send(message)

    def report(self) -> None:
        """Tell all clients how the engines are; call every second."""
        for engine in self.engines:
            engine.report()

    @property
    def num_live(self) -> int:
        return sum(engine.num_live for engine in self.engines)
