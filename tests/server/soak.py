"""A crowd of clients, many of them bad ones, for as long as one likes: each request ends once.

`python -m tests.server.soak --clients 128 --seconds 120` starts a server with a tiny model and
prints the figures; `--url` asks one that runs. The status is 1 if anything was wrong: a status 5xx,
a stream that did not end exactly once, a request that is left, or memory that grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.support.server import Server, memory_mib

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
MALFORMED = [b"{", b"[]", b'{"messages": []}', b'{"messages": 3, "n": 0}']
# What a client does next: how often, of a hundred.
MANNERS = {"whole": 25, "streamed": 25, "cancelled": 15, "slow": 15, "deaf": 7, "half": 8, "bad": 5}
REST_S = 30.0  # for the server to be idle again
ROUNDS = 3  # of the crowd, with a rest after each
MAX_GROWTH_MIB = 32.0  # of the rest after the last round over the rests before it


class Soak:
    """counts: requests by what the client did. statuses: of all answers. gaps_s: between two events
    of a stream that is read at once. faults: what was wrong, in words."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url, self._address = url, (parts.hostname or "127.0.0.1", parts.port or 80)
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.gaps_s: list[float] = []
        self.faults: list[str] = []

    async def run(self, number: int, clients: int, seconds: float) -> None:
        """One round, and the rest after it. number: of the round; each has its own requests."""
        seeds = range(number * clients, (number + 1) * clients)
        until = time.monotonic() + seconds
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(self._client(session, seed, until) for seed in seeds))
            await self._check_rest(session)

    async def _client(self, session: aiohttp.ClientSession, seed: int, until: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            (manner,) = rng.choices(list(MANNERS), list(MANNERS.values()))
            try:
                await getattr(self, f"_{manner}")(session, rng)
                self.counts[manner] += 1
            except (TimeoutError, OSError, aiohttp.ClientError) as error:
                self.faults.append(f"{manner}: {type(error).__name__}: {error}")

    def _answered(self, status: int, expected: int = 200) -> None:
        self.statuses[status] += 1
        if status != expected:
            self.faults.append(f"status {status} instead of {expected}")

    # -- clients that behave -----------------------------------------------------------------------

    async def _whole(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        body = a_body(rng)
        async with session.post(self.url + PATH, json=body) as response:
            answer = await response.json()
        self._answered(response.status)
        expected = body["max_tokens"] * body.get("n", 1)
        if answer.get("usage", {}).get("completion_tokens") != expected:
            self.faults.append(f"{expected} tokens were to come: {answer}"[:500])

    async def _streamed(
        self, session: aiohttp.ClientSession, rng: random.Random, most: int | None = None
    ) -> None:
        """All of it, or the events up to `most`."""
        body, lines, last = a_body(rng) | {"stream": True}, list[bytes](), 0.0
        async with session.post(self.url + PATH, json=body) as response:
            self._answered(response.status)
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                now = time.monotonic()
                if lines:
                    self.gaps_s.append(now - last)
                lines.append(line)
                last = now
                if len(lines) == most:
                    return
        self._check_stream(b"".join(lines), body)

    async def _bad(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        data = rng.choice(MALFORMED)
        async with session.post(self.url + PATH, data=data, headers=JSON) as response:
            self._answered(response.status, 400)
            if "error" not in await response.json():
                self.faults.append(f"a refusal without an error: {await response.text()}")

    # -- and that do not ---------------------------------------------------------------------------

    async def _cancelled(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        await self._streamed(session, rng, most=rng.randrange(1, 4))

    async def _slow(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        """Takes a stream in small pieces through a small buffer, to its end."""
        body = a_body(rng) | {"stream": True, "logprobs": True, "top_logprobs": 20}
        async with self._connected(raw_request(body)) as connection:
            received = bytearray()
            while piece := await asyncio.wait_for(receive(connection, 2048), 60):
                received += piece
                await asyncio.sleep(0.02)
        self._answered(int(received.split(b" ", 2)[1] or 0))
        self._check_stream(bytes(received), body)

    async def _deaf(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        """Asks for much, reads nothing, and resets the connection."""
        body = a_body(rng) | {"stream": True, "max_tokens": 400, "n": 2, "top_logprobs": 20}
        async with self._connected(raw_request(body | {"logprobs": True})):
            await asyncio.sleep(rng.uniform(0, 3))

    async def _half(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        """Sends a part of a request and waits, and then sends or reads no more."""
        data = raw_request(a_body(rng))
        async with self._connected(data[: rng.randrange(len(data))]):
            await asyncio.sleep(rng.uniform(0, 3))

    @contextlib.asynccontextmanager
    async def _connected(self, data: bytes) -> Any:
        """A socket with a small buffer, from which data was sent; reset in the end."""
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, self._address)
            await loop.sock_sendall(connection, data)
            yield connection

    # -- checks ------------------------------------------------------------------------------------

    def _check_stream(self, received: bytes, body: dict[str, Any]) -> None:
        """Each choice ends once, and the stream ends once."""
        ends = len(re.findall(rb'"finish_reason":\s*"', received))
        done, failed = received.count(b"data: [DONE]"), b'data: {"error"' in received
        if failed or (ends, done) != (body.get("n", 1), 1):
            self.faults.append(f"{ends} ends and {done} [DONE] of {body}: ...{received[-300:]!r}")

    async def _check_rest(self, session: aiohttp.ClientSession) -> None:
        """Nobody is left, nor are any blocks."""
        deadline = time.monotonic() + REST_S
        left = {"requests": 1.0}
        while left and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            async with session.get(f"{self.url}/metrics") as response:
                left = loads(await response.text())
        if left:
            self.faults.append(f"left after {REST_S:.0f} s: {left}")
        async with session.get(f"{self.url}/health") as response:
            self._answered(response.status)


def a_body(rng: random.Random) -> dict[str, Any]:
    words = " ".join(rng.choice(["of", "the", "sea"]) for _ in range(rng.choice([3, 40, 200])))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": rng.choice([4, 16, 40]),
        "ignore_eos": True,
        "seed": rng.randrange(99),
    }
    return body | rng.choice([{}, {}, {"n": 2}, {"top_p": 0.9}, {"frequency_penalty": 0.5}])


def raw_request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


async def receive(connection: socket.socket, most: int) -> bytes:
    return await asyncio.get_running_loop().sock_recv(connection, most)


def loads(metrics: str) -> dict[str, float]:
    """The gauges that are 0 when nobody is served, where they are not."""
    pattern = r"^\S*?(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$"
    found = {name: float(value) for name, value in re.findall(pattern, metrics, re.MULTILINE)}
    assert len(found) == 3, found
    return {name: value for name, value in found.items() if value}


async def soak(url: str, pids: dict[str, int], clients: int, seconds: float) -> dict[str, Any]:
    """The figures, of which `faults` should be empty. memory_mib: at rest after each round."""
    crowd, memory = Soak(url), {name: list[float]() for name in pids}
    for number in range(ROUNDS):
        await crowd.run(number, clients, seconds / ROUNDS)
        for name, pid in pids.items():
            memory[name].append(memory_mib(pid))
    for name, (*earlier, after) in memory.items():
        before = max(earlier)
        if after - before > MAX_GROWTH_MIB:
            crowd.faults.append(f"the {name}'s memory grew from {before:.0f} to {after:.0f} MiB")
    gaps = sorted(crowd.gaps_s)
    return {
        "requests": dict(crowd.counts),
        "statuses": dict(crowd.statuses),
        "gap_s": {f"p{p}": gaps[len(gaps) * p // 100] for p in (50, 99)} if gaps else {},
        "memory_mib": memory,
        "faults": crowd.faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.server.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--url", help="of a server that runs; default: one with a tiny model")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url, pids = arguments.url, dict[str, int]()
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = tiny_server(folder)
            stack.callback(server.stop)
            url, pids = server.url, server.wait_until_ready().pids()
        figures = asyncio.run(soak(url, pids, arguments.clients, arguments.seconds))
    print(json.dumps(figures, indent=1))
    return 1 if figures["faults"] else 0


def tiny_server(folder: Path) -> Server:
    from compiledllm.models.source import resolve_checkpoint
    from tests.support.tiny import CHAT, copy_tokenizer, save_random_model

    model = folder / "model"
    save_random_model(model, "llama", **CHAT)
    copy_tokenizer(resolve_checkpoint(None), model)
    return Server(model, folder)


if __name__ == "__main__":
    sys.exit(main())
