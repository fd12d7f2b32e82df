"""The server's side of the engine, without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("msgspec")

from compiledllm.server.engine_client import EngineClient
from compiledllm.server.live_request import DeadlineExceeded, Limits, LiveRequest, Overloaded
from compiledllm.server.wire import Finish


def test_the_deadline_ends_a_request_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    request = SimpleNamespace(request_id="r", is_finished=False, num_prompt_tokens=1)
    state: Any = SimpleNamespace(request_id="r", completions=[SimpleNamespace(request=request)])
    client = EngineClient({}, Limits(8, 8, request_seconds=0.1, stuck_seconds=9), Path())
    sent: list[Any] = []
    monkeypatch.setattr(client, "_send", sent.append)
    live = client._live["r"] = LiveRequest(state)

    async def run() -> None:
        outputs = client.generate(state)
        live.put(SimpleNamespace(finished=False))  # type: ignore[arg-type]
        assert len(await anext(outputs)) == 1
        for _ in range(50):  # while the reader is busy with the first
            live.put(SimpleNamespace(finished=False))  # type: ignore[arg-type]
        await asyncio.sleep(0.2)
        assert sent == [Finish(["r"], "abort")]
        assert not live.outputs and not client._live
        with pytest.raises(DeadlineExceeded):
            await anext(outputs)
        await outputs.aclose()
        assert len(sent) == 1

    asyncio.run(run())


def test_prompts_are_let_in_up_to_so_many_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client = EngineClient({}, Limits(9, 20, request_seconds=9, stuck_seconds=9), Path())
    client.state, client.requests = "ready", cast(Any, object())
    client.ready = cast(Any, SimpleNamespace(options={"max_num_seqs": 4}))
    monkeypatch.setattr(client, "_send", lambda message: None)
    monkeypatch.setattr(client, "_send_request", lambda live: None)
    first, second, third = (_state_of(name, num_completions=2) for name in "abc")
    for _ in range(3):  # as often as one likes: what is over does not count
        client.admit([first, second])
        with pytest.raises(Overloaded, match="prompts of 20 tokens"):
            client.admit([third])
        client.release([first])
        client.admit([third])
        client.release([second, third])


def _state_of(name: str, num_completions: int) -> Any:
    """A request of five tokens for each completion."""
    requests = [
        SimpleNamespace(request_id=f"{name}{n}", is_finished=False, num_prompt_tokens=5)
        for n in range(num_completions)
    ]
    completions = [SimpleNamespace(request=request) for request in requests]
    return SimpleNamespace(request_id=name, completions=completions)
