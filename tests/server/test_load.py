"""64 clients at once, with cancellations and malformed requests among them: each ends once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import aiohttp
import pytest

from tests.support.server import wait_for

pytestmark = pytest.mark.real_model  # its tokenizer

CLIENTS, SECONDS = 64, 15
MALFORMED = [b"{", b"[]", b'{"messages": []}', b'{"messages": 3, "n": 0}']
JSON = {"content-type": "application/json"}


class Crowd:
    """Counts what came of each request."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/chat/completions"
        self.counts = {"whole": 0, "streamed": 0, "cancelled": 0, "refused": 0}

    async def client(self, session: aiohttp.ClientSession, seed: int, until: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            await self.ask(session, rng)

    async def ask(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        if rng.random() < 0.1:
            async with session.post(self.url, data=rng.choice(MALFORMED), headers=JSON) as response:
                assert response.status == 400 and "error" in await response.json()
                self.counts["refused"] += 1
            return
        words = " ".join(rng.choice(["of", "the", "sea"]) for _ in range(rng.choice([3, 40, 200])))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": rng.choice([4, 16, 40]),
            "ignore_eos": True,
            "seed": rng.randrange(99),
        }
        body |= rng.choice([{}, {}, {"n": 2}, {"top_p": 0.9}, {"frequency_penalty": 0.5}])
        if rng.random() < 0.3:
            await self.whole(session, body)
        else:
            cancel_after = rng.randrange(1, body["max_tokens"]) if rng.random() < 0.3 else None
            await self.streamed(session, body, cancel_after)

    async def whole(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        async with session.post(self.url, json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            expected = body["max_tokens"] * body.get("n", 1)
            assert answer["usage"]["completion_tokens"] == expected
            self.counts["whole"] += 1

    async def streamed(
        self, session: aiohttp.ClientSession, body: dict[str, Any], cancel_after: int | None
    ) -> None:
        ends, done, chunks = 0, 0, 0
        async with session.post(self.url, json=body | {"stream": True}) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    done += 1
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    ends += bool(event["choices"][0]["finish_reason"])
                    chunks += 1
                if cancel_after is not None and chunks > cancel_after:
                    self.counts["cancelled"] += 1
                    return
        assert (ends, done) == (body.get("n", 1), 1)
        self.counts["streamed"] += 1


def test_everybody_is_served_and_nothing_is_left(server: Any) -> None:
    crowd = Crowd(server.url)

    async def run() -> None:
        until = time.monotonic() + SECONDS
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(crowd.client(session, n, until) for n in range(CLIENTS)))

    asyncio.run(run())
    assert min(crowd.counts.values()) > 0 and sum(crowd.counts.values()) > CLIENTS
    idle = [f'{name}{{model_name="tiny"}} 0.0' for name in ("num_requests_running", "waiting")]

    def is_idle() -> bool:
        text = str(server.get("/metrics")[1])
        return 'kv_cache_usage_perc{model_name="tiny"} 0.0' in text and all(
            line in text for line in idle
        )

    wait_for(is_idle)
    assert server.get("/health")[0] == 200 and "leak" not in server.log
