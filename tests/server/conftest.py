"""Real servers, each in a process of its own, with a tiny model and a real tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server


@pytest.fixture(scope="session")
def start_server(
    tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """start_server(*options, model=None, max_files=None, **environment) -> Server.

    All are stopped at the end.
    """
    servers: list[Server] = []

    def start(*options: str, model: Path | None = None, **more: Any) -> Server:
        folder = tmp_path_factory.mktemp("server")
        servers.append(Server(model or tiny_chat_model, folder, *options, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """One that tests share, and do no harm to."""
    return start_server().wait_until_ready()
