"""The server's side of the engine, without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("msgspec")

from compiledllm.server.engine_client import EngineClient
from compiledllm.server.live_request import DeadlineExceeded, Limits, LiveRequest
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
