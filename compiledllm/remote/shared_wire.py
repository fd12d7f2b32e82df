"""Messages between the process that owns engines and the processes that send them requests.

They are frames as in `wire`. Engines are numbered. A `generation` numbers the processes that an
engine has had, so that what was meant for an ended one does not reach the next one.
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
    """An engine takes requests."""

    engine: int
    generation: int
    ready: Ready


class EngineEnded(msgspec.Struct, tag=True):
    """An engine's process has ended. started: which of this client's requests ran in it."""

    engine: int
    generation: int
    cause: str
    started: list[str]


class EngineNews(msgspec.Struct, tag=True):
    """What a step did to this client's requests."""

    engine: int
    news: StepNews


class EngineReport(msgspec.Struct, tag=True):
    """How an engine is; sent every second and with each change.

    problem: why it is unhealthy. num_unread_bytes: of what all clients have sent to it.
    """

    engine: int
    state: State
    problem: str | None
    num_restarts: int
    num_unread_bytes: int
    stats: Stats | None = None
    failure: Failed | None = None


class BeginTurn(msgspec.Struct, tag=True):
    """This client may try its requests that ran when an engine ended (`replay`)."""

    engine: int
    generation: int


class TurnsOver(msgspec.Struct, tag=True):
    """All clients have tried theirs, and the other requests may follow."""

    engine: int
    generation: int


class Drain(msgspec.Struct, tag=True):
    """Admit no more requests, finish those in progress within so many seconds, and exit."""

    timeout_s: float


class AskMetrics(msgspec.Struct, tag=True):
    """Asks a client for its metrics, or the owner for those of all."""

    number: int


class AllMetrics(msgspec.Struct, tag=True):
    """The metrics of all processes, as they are shown."""

    number: int
    shown: bytes


class Relay(msgspec.Struct, tag=True):
    """A message for an engine, which the owner passes on unread.

    opened, closed: ids of requests that begin and end with it. num_finished: how many of those that
    end are complete.
    """

    engine: int
    generation: int
    message: msgspec.Raw
    opened: list[str] = []
    closed: list[str] = []
    num_finished: int = 0
    is_vocabulary: bool = False


class EndTurn(msgspec.Struct, tag=True):
    """This client has no more requests to try."""

    engine: int
    generation: int


class Routed(msgspec.Struct, tag=True):
    """A prompt went to this engine; sent to the owner, who tells the other clients."""

    engine: int
    keys: list[int]


class MetricFamily(msgspec.Struct, array_like=True):
    """A family of metrics, as samples: (name, labels, value) of each."""

    name: str
    text: str
    kind: Literal["counter", "gauge", "histogram"]
    samples: list[tuple[str, dict[str, str], float]]


class MetricsReport(msgspec.Struct, tag=True):
    """A client's metrics. number: of the question; 0: sent every second, unasked."""

    number: int
    families: list[MetricFamily]


OfEngine = EngineReady | EngineEnded | EngineNews | EngineReport | BeginTurn | TurnsOver
ToClient = Begin | OfEngine | Routed | Drain | AskMetrics | AllMetrics
ToOwner = Relay | EndTurn | Routed | MetricsReport | AskMetrics | Failed
