"""Connects the engines of this process with the client processes that send them requests.

`take` passes a client's message to the engine or to the other clients; `SharedEngineLife` sends
each client the news of its requests. See README.md: several client processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiledllm.remote.client_link import ClientLink
from compiledllm.remote.shared_life import SharedEngineLife
from compiledllm.remote.shared_wire import EndTurn, Relay, Routed


class Hub:
    """The engines of this process and their clients. engines: by number; need not be started."""

    def __init__(self, engines: Sequence[SharedEngineLife]) -> None:
        self.engines = engines
        self._links: list[ClientLink] = []

    def connect(self, link: ClientLink) -> None:
        """Add a client, which may send requests from now on."""
        self._links.append(link)
        for engine in self.engines:
            engine.connect(link)

    def disconnect(self, link: ClientLink) -> None:
        """Abort the requests of a client that has ended."""
        self._links.remove(link)
        for engine in self.engines:
            engine.disconnect(link)

    def take(self, link: ClientLink, message: Relay | EndTurn | Routed) -> None:
        """Pass a message of the client `link` on. A `Routed` message goes to all other clients."""
        if isinstance(message, Relay):
            self.engines[message.engine].relay(link, message)
        elif isinstance(message, EndTurn):
            self.engines[message.engine].end_turn(link, message)
        else:
            for other in self._links:
                if other is not link:
                    other.send(message)

    def report(self) -> None:
        """Send the state of all engines to all clients. Call this every second."""
        for engine in self.engines:
            engine.report()

    @property
    def num_live(self) -> int:
        return sum(engine.num_live for engine in self.engines)
