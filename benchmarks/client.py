"""One client process of `bench serve`: sends its share of the requests and records the outcomes.

The module does not import torch, so a process starts quickly. The code that runs for every piece of
text is short, because one process reads hundreds of streams at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from compiledllm.benchmarks.workload import SampleRequest
from compiledllm.config import ConfigError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import aiohttp

_TEXTS = ("content", "text", "reasoning_content", "reasoning")
# A quote inside a JSON string is escaped, so these byte patterns match keys and values only.
_HAS_TEXT = re.compile(rb'"(?:%b)" ?: ?"[^"]' % "|".join(_TEXTS).encode())
_HAS_MORE = re.compile(rb'"(?:usage|error)"(?! ?: ?null)')


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test. endpoint: the path of completions or of chat completions."""

    base_url: str
    endpoint: str
    model: str | None
    timeout_s: float

    @property
    def is_chat(self) -> bool:
        return self.endpoint.rstrip("/").endswith("chat/completions")

    def check(self, requests: Sequence[SampleRequest]) -> None:
        """Raise ConfigError for prompts that the endpoint cannot take."""
        if self.is_chat and not all(isinstance(request.prompt, str) for request in requests):
            raise ConfigError(f"{self.endpoint} takes text prompts, the dataset has token ids")

    def body(self, model: str, request: SampleRequest) -> dict[str, Any]:
        """A greedy request for exactly `output_len` tokens, where the server knows ignore_eos."""
        if self.is_chat:
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": request.prompt}]}
        else:
            prompt = {"prompt": request.prompt}
        return prompt | {
            "model": model,
            "max_tokens": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive.

    request_rate: requests per second (inf: all at once). burstiness: shape parameter of the gamma
    distribution of the gaps; 1 is a Poisson process, less is burstier. goodput: metric -> limit in
    ms that a good request stays within.
    """

    request_rate: float
    max_concurrency: int | None
    burstiness: float = 1.0
    goodput: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def arrivals(self, count: int) -> list[float]:
        """Seconds after the start at which each request is sent."""
        rng, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            if self.request_rate != float("inf"):
                now += rng.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))
        return times


@dataclass(slots=True)
class Outcome:
    """The outcome of one request. Times: seconds of the monotonic clock. Tokens: by the server."""

    sent: float = 0.0
    stamps: list[float] = field(default_factory=list)  # arrival of each piece of text
    ended: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None

    def milliseconds(self) -> dict[str, float | None]:
        """ttft, tpot and e2el; tpot is None for fewer than two tokens."""
        first = self.stamps[0]
        tpot = (self.ended - first) / (self.tokens - 1) * 1e3 if self.tokens > 1 else None
        return {
            "ttft": (first - self.sent) * 1e3,
            "tpot": tpot,
            "e2el": (self.ended - self.sent) * 1e3,
        }


class ClientShare(NamedTuple):
    """The requests of one process, and the seconds after the start at which each is sent."""

    target: Target
    model: str
    requests: Sequence[SampleRequest]
    arrivals: Sequence[float]
    max_concurrency: int


class ClientOutcomes(NamedTuple):
    """The outcomes of a share. start, end: seconds of the monotonic clock, common to processes."""

    start: float
    end: float
    outcomes: list[Outcome]


def deal(
    target: Target, model: str, requests: Sequence[SampleRequest], load: Load, num_clients: int
) -> list[ClientShare]:
    """Deal the requests to the processes round-robin.

    There are fewer processes where the concurrency limit does not give each of them a request."""
    max_concurrency = min(load.max_concurrency or len(requests), len(requests))
    count, arrivals = min(num_clients, max_concurrency), load.arrivals(len(requests))
    while load.max_concurrency and load.max_concurrency % count:
        count -= 1
    return [
        ClientShare(
            target,
            model,
            requests[i::count],
            arrivals[i::count],
            len(range(i, max_concurrency, count)),
        )
        for i in range(count)
    ]


def serve_share(connection: Connection, share: ClientShare) -> None:
    """Run in a child process: report ready, wait for the start signal, send back the outcomes."""
    import aiohttp  # noqa: F401

    connection.send(None)
    connection.recv()
    connection.send(asyncio.run(send_share(share)))


async def send_share(
    share: ClientShare, advance: Callable[[], None] = lambda: None
) -> ClientOutcomes:
    """advance: called with each finished request."""
    slots = asyncio.Semaphore(share.max_concurrency)

    async def send_at(send_time_s: float, request: SampleRequest) -> Outcome:
        await asyncio.sleep(send_time_s - time.monotonic())
        async with slots:
            outcome = await send(session, share.target, share.model, request)
        advance()
        return outcome

    async with open_session(share.target) as session:
        start = time.monotonic()
        send_times = [start + arrival for arrival in share.arrivals]
        outcomes = await asyncio.gather(*map(send_at, send_times, share.requests))
        return ClientOutcomes(start, time.monotonic(), outcomes)


@contextlib.asynccontextmanager
async def open_session(target: Target) -> AsyncIterator[aiohttp.ClientSession]:
    import aiohttp

    key = os.environ.get("OPENAI_API_KEY")
    async with aiohttp.ClientSession(
        base_url=target.base_url,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s),
        read_bufsize=2**20,
    ) as session:
        yield session


async def first_model(session: aiohttp.ClientSession, target: Target) -> str:
    import aiohttp

    url = f"{target.base_url}/v1/models"
    try:
        async with session.get("/v1/models") as response:
            listing = await response.json()
            return str(listing["data"][0]["id"])
    except aiohttp.ClientConnectionError as error:
        raise ConfigError(f"{url} cannot be reached ({error}); is the server running?") from None
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{url} names no model ({error!r}); name it with --model") from None


async def send(
    session: aiohttp.ClientSession, target: Target, model: str, request: SampleRequest
) -> Outcome:
    import aiohttp

    outcome = Outcome(sent=time.monotonic())
    try:
        async with session.post(target.endpoint, json=target.body(model, request)) as response:
            if response.status != 200:
                text = (await response.text())[:300]
                outcome.error = f"HTTP {response.status}: {text}"
                return outcome
            await _read(response.content, outcome)
    except aiohttp.ClientConnectorError as error:
        outcome.error = f"it cannot be reached ({error}); is the server running?"
    except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError, TypeError) as error:
        outcome.error = str(error) or type(error).__name__
    outcome.ended = outcome.stamps[-1] if outcome.stamps else time.monotonic()
    if not outcome.stamps and outcome.error is None:
        outcome.error = "the answer had no text"
    outcome.tokens = outcome.tokens or len(outcome.stamps)
    return outcome


async def _read(content: aiohttp.StreamReader, outcome: Outcome) -> None:
    """Read the lines of an event stream; lines of one chunk share a time stamp."""
    rest = b""
    async for data in content.iter_any():
        now = time.monotonic()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            _read_line(line, outcome, now)
    _read_line(rest, outcome, time.monotonic())


def _read_line(line: bytes, outcome: Outcome, now: float) -> None:
    """Record one event: text gets a time stamp, usage is stored, an error raises.

    Text is not parsed as JSON; usage and errors are."""
    if not line.startswith(b"data:"):
        return
    if _HAS_TEXT.search(line):
        outcome.stamps.append(now)
    if not _HAS_MORE.search(line):
        return
    event = json.loads(line[5:])
    if "error" in event:
        raise ValueError(f"the server ended the stream: {event['error']}")
    if usage := event.get("usage"):
        outcome.tokens = usage.get("completion_tokens", 0)
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
