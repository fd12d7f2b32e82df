"""What an engine on a Ray cluster was waiting for when its time ran out, without a cluster."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from compiledllm.remote import ray_engines
from compiledllm.remote.ray_engines import RayEngines


class _Room:
    """Room that is found at once, or never."""

    def __init__(self, is_found: bool) -> None:
        self.ready: Future[None] = Future()
        if is_found:
            self.ready.set_result(None)
        self.group = SimpleNamespace(ready=lambda: SimpleNamespace(future=lambda: self.ready))
        self.is_given_back = False

    def give_back(self) -> None:
        self.is_given_back = True


async def _never(*_: object) -> Any:
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("is_found", "cause"),
    [
        (False, "Ray has not found 2 free CPUs within 0 s"),
        (True, "Ray has found room, but the engine's process there has not connected within 0 s"),
    ],
)
def test_an_engine_that_does_not_start_says_what_was_missing(
    is_found: bool, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = _Room(is_found)
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray_engines, "load_ray", lambda: cluster)
    monkeypatch.setattr(ray_engines, "START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(ray_engines.Room, "reserve", lambda *_: room)
    monkeypatch.setattr(RayEngines, "_spawn_in", _never)
    engines = RayEngines(1, 2, "cpu")
    with pytest.raises(OSError, match=cause):
        asyncio.run(engines.spawn(["engine"]))
    assert room.is_given_back
