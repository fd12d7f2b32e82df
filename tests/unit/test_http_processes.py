"""What the owner of HTTP processes does without any: who is killed, and what counts together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("uvicorn")

from compiledllm.remote.hub import Hub
from compiledllm.remote.limits import Limits
from compiledllm.remote.shared_table import SharedTable
from compiledllm.remote.wire import Failed
from compiledllm.server import http_processes
from compiledllm.server.connections import Deadlines
from compiledllm.server.http_process import SharedConnections
from compiledllm.server.http_processes import HttpProcesses
from compiledllm.server.owner_metrics import OwnerMetrics
from compiledllm.server.process_settings import (
    ProcessSettings,
    ProcessState,
    num_columns,
    state_column,
)


class Child:
    """A process that does nothing."""

    def __init__(self, num_silent_s: int = 0, num_unread_bytes: int = 0, new: bool = False) -> None:
        self.num_silent_s, self.has_reported = num_silent_s, not new
        self.link = SimpleNamespace(num_unread_bytes=num_unread_bytes)
        self.was_killed = False

    def kill(self) -> None:
        self.was_killed = True


class Connection:
    """A connection that is not idle."""


def test_a_process_that_is_silent_or_does_not_read_is_killed() -> None:
    metrics, limits = OwnerMetrics("x:", "model", []), Limits(9, 99, stuck_s=30)
    settings_of = cast(Any, None)
    table = SharedTable.create(1, 2)
    processes = HttpProcesses(1, settings_of, Hub([]), table, metrics, limits)
    children = {
        "well": Child(num_silent_s=59),
        "silent": Child(num_silent_s=60),
        "starting": Child(num_silent_s=60, new=True),
        "reading": Child(num_unread_bytes=http_processes.MAX_UNREAD_BYTES),
        "full": Child(num_unread_bytes=http_processes.MAX_UNREAD_BYTES + 1),
    }
    processes._children = cast(Any, list(children.values()))
    processes.sweep()
    killed = {name for name, child in children.items() if child.was_killed}
    assert killed == {"silent", "full"}


@pytest.mark.parametrize("others_serve", [False, True])
def test_a_wrong_configuration_ends_no_server_that_serves(
    others_serve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a certificate that is being replaced while a process is started again."""
    metrics, table = OwnerMetrics("x:", "model", []), SharedTable.create(2, num_columns(0))
    limits, settings_of = Limits(9, 99), cast(Any, None)
    processes = HttpProcesses(2, settings_of, Hub([]), table, metrics, limits)
    table.write(1, state_column(0), ProcessState.READY if others_serve else ProcessState.LOADING)
    started = []

    async def run_one(row: int) -> tuple[Failed, bool]:
        started.append(row)
        processes._is_ending = len(started) == 2
        return Failed("no certificate", is_config=True), False

    monkeypatch.setattr(processes, "_run_one", run_one)
    asyncio.run(processes._keep(0))
    assert len(started) == 1 + others_serve
    assert (processes.failure is None) == others_serve


def test_the_limit_on_connections_counts_those_of_all_processes() -> None:
    table = SharedTable.create(2, 1)
    first, second = (
        SharedConnections(8, Deadlines(9, 9), table, row, column=0) for row in range(2)
    )
    added: list[Any] = [Connection() for _ in range(9)]
    assert all(first.add(connection) for connection in added[:5])
    assert all(second.add(connection) for connection in added[5:8])
    assert not second.add(added[8]) and first.num_open == 9
    second.discard(added[8])
    first.discard(added[0])
    assert second.num_open == 7 and second.add(added[8])
    table.clear(0)  # a process that has ended
    assert second.num_open == 4


def test_settings_keep_numbers_of_any_size() -> None:
    arguments: dict[str, Any] = {"a": 10**30, "b": float("inf"), "c": [None, "x"], "d": {"e": True}}
    given = ProcessSettings(arguments, ["key"], True, "::1", 9, "3", 0, 2, 1, False)
    assert ProcessSettings.from_json(given.as_json()) == given
    assert given.namespace.a == 10**30
