"""Messages between the process that owns the engines (the owner) and its client processes.

Messages are frames as in `wire`. `engine` is an engine's number. `generation` counts the processes
that an engine has had, so that a message for an ended process does not reach the next one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from compiledllm.remote.engine_state import State
from compiledllm.remote.wire import Failed, Ready, Stats
from compiledllm.types import StepNews


class Begin(msgspec.Struct, tag=True):
    """The first message to a client's process: its settings, as JSON."""

    settings: str


class EngineReady(msgspec.Struct, tag=True):
    """An engine has started and takes requests."""

    engine: int
    generation: int
    ready: Ready


class EngineEnded(msgspec.Struct, tag=True):
    """An engine's process has ended.

    started: ids of this client's requests that had begun to run in the process.
    """

    engine: int
    generation: int
    cause: str
    started: list[str]


class EngineNews(msgspec.Struct, tag=True):
    """What a step did to this client's requests."""

    engine: int
    news: StepNews


class EngineReport(msgspec.Struct, tag=True):
    """The state of an engine; sent every second and with each change.

    problem: why the engine is unhealthy; None: it is healthy. num_unread_bytes: bytes from all
    clients that the engine has not read.
    """

    engine: int
    state: State
    problem: str | None
    num_restarts: int
    num_unread_bytes: int
    stats: Stats | None = None
    failure: Failed | None = None


class BeginTurn(msgspec.Struct, tag=True):
    """This client may send its suspects: requests that ran when a process ended (`replay`)."""

    engine: int
    generation: int


class TurnsOver(msgspec.Struct, tag=True):
    """All clients have tried their suspects, so all other requests may be sent."""

    engine: int
    generation: int


class Drain(msgspec.Struct, tag=True):
    """Admit no more requests, finish the requests in progress within `timeout_s`, and exit."""

    timeout_s: float


class AskMetrics(msgspec.Struct, tag=True):
    """Asks a client for its own metrics, or the owner for the metrics of all processes.

    number: identifies the question; the answer has the same number.
    """

    number: int


class AllMetrics(msgspec.Struct, tag=True):
    """The metrics of all processes. shown: the text that `/metrics` answers."""

    number: int
    shown: bytes


class Relay(msgspec.Struct, tag=True):
    """A message for an engine, which the owner passes on unread.

    opened, closed: ids of the requests that begin and end with this message. num_finished: how many
    of the closed requests are complete. is_vocabulary: the message is a vocabulary, which an engine
    needs from one client only.
    """

    engine: int
    generation: int
    message: msgspec.Raw
    opened: list[str] = []
    closed: list[str] = []
    num_finished: int = 0
    is_vocabulary: bool = False


class EndTurn(msgspec.Struct, tag=True):
    """This client has tried all its suspects."""

    engine: int
    generation: int


class Routed(msgspec.Struct, tag=True):
    """A client has sent a prompt to this engine. The owner passes the message to the other clients.

    keys: hashes of the prompt's beginnings (`routing`).
    """

    engine: int
    keys: list[int]


class MetricFamily(msgspec.Struct, array_like=True):
    """A family of metrics. text: its help text. samples: (name, labels, value) of each."""

    name: str
    text: str
    kind: Literal["counter", "gauge", "histogram"]
    samples: list[tuple[str, dict[str, str], float]]


class MetricsReport(msgspec.Struct, tag=True):
    """A client's metrics. number: of the `AskMetrics` message; 0: the report of every second."""

    number: int
    families: list[MetricFamily]


OfEngine = EngineReady | EngineEnded | EngineNews | EngineReport | BeginTurn | TurnsOver
ToClient = Begin | OfEngine | Routed | Drain | AskMetrics | AllMetrics
ToOwner = Relay | EndTurn | Routed | MetricsReport | AskMetrics | Failed
