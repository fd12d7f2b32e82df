"""A client for any OpenAI-compatible server: arrivals, concurrency, and what each request saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compiledllm.benchmarks.report import Row, percentiles
from compiledllm.benchmarks.workload import SampleRequest
from compiledllm.config import ConfigError

if TYPE_CHECKING:
    import aiohttp

_WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "was", "for", "on", "are")
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Target:
    """The server and how to ask it. endpoint: of completions or of chat completions."""

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

    request_rate: a second, Poisson (inf: all at once). burstiness: shape of the gamma distribution
    of the gaps; 1 is Poisson, below more bursty. goodput: metric -> ms a good request stays within.
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
    """What one request saw: seconds on the monotonic clock, tokens as the server counted them."""

    sent: float = 0.0
    stamps: list[float] = field(default_factory=list)  # of each piece of text
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


def measure_serving(
    target: Target,
    requests: Sequence[SampleRequest],
    loads: Sequence[Load],
    advance: Callable[[str], None],
) -> tuple[str, list[Row]]:
    """The model's name and a row for each load. Raises ConfigError if the server cannot be used."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError(
            "bench serve needs aiohttp, which is not installed: pip install 'compiledllm[bench]'"
        ) from None
    return asyncio.run(_measure(target, requests, loads, advance))


def checked_url(url: str) -> str:
    """The server's address without a path; clients are used to writing /v1 behind it."""
    stripped = url.rstrip("/").removesuffix("/v1")
    if not stripped.startswith(("http://", "https://")) or "/" in stripped.partition("://")[2]:
        raise ConfigError(f"--base-url must look like http://host:port, got {url!r}")
    return stripped


def as_text(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Token ids as so many common words, about a token each, for a server whose ids are unknown."""
    return [
        SampleRequest(" ".join(_WORDS[i % len(_WORDS)] for i in r.prompt), r.output_len)
        if isinstance(r.prompt, list)
        else r
        for r in requests
    ]


async def _measure(
    target: Target,
    requests: Sequence[SampleRequest],
    loads: Sequence[Load],
    advance: Callable[[str], None],
) -> tuple[str, list[Row]]:
    async with _session(target) as session:
        model = target.model or await _first_model(session, target)
        probe = await _send(session, target, model, requests[0])
        if probe.error is not None:
            raise ConfigError(f"{target.base_url}{target.endpoint}: {probe.error}")
        return model, [
            await _run(session, target, model, requests, load, advance) for load in loads
        ]


@contextlib.asynccontextmanager
async def _session(target: Target) -> AsyncIterator[aiohttp.ClientSession]:
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


async def _first_model(session: aiohttp.ClientSession, target: Target) -> str:
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


async def _run(
    session: aiohttp.ClientSession,
    target: Target,
    model: str,
    requests: Sequence[SampleRequest],
    load: Load,
    advance: Callable[[str], None],
) -> Row:
    slots = asyncio.Semaphore(load.max_concurrency or len(requests))

    async def send_at(due: float, request: SampleRequest) -> Outcome:
        await asyncio.sleep(due - time.monotonic())
        async with slots:
            outcome = await _send(session, target, model, request)
        advance(f"rate {load.request_rate:g}")
        return outcome

    start = time.monotonic()
    arrivals = [start + seconds for seconds in load.arrivals(len(requests))]
    outcomes = await asyncio.gather(*map(send_at, arrivals, requests))
    return summarise(outcomes, load, time.monotonic() - start)


async def _send(
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
            async for line in response.content:
                _read_event(line, outcome)
    except aiohttp.ClientConnectorError as error:
        outcome.error = f"it cannot be reached ({error}); is the server running?"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        outcome.error = str(error) or type(error).__name__
    outcome.ended = outcome.stamps[-1] if outcome.stamps else time.monotonic()
    if not outcome.stamps and outcome.error is None:
        outcome.error = "the answer had no text"
    outcome.tokens = outcome.tokens or len(outcome.stamps)
    return outcome


def _read_event(line: bytes, outcome: Outcome) -> None:
    """One line of the event stream: text gets a time stamp, usage is noted, errors raise."""
    if not line.startswith(b"data:"):
        return
    data = line[5:].strip()
    if data == b"[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        raise ValueError(f"the server ended the stream: {event['error']}")
    if usage := event.get("usage"):
        outcome.tokens = usage.get("completion_tokens", 0)
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or choice
        if any(delta.get(name) for name in ("content", "text", "reasoning_content")):
            outcome.stamps.append(time.monotonic())


def summarise(outcomes: Sequence[Outcome], load: Load, seconds: float) -> Row:
    """One row. Raises ConfigError if every request failed, with the most frequent cause."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    if not good:
        cause, count = errors.most_common(1)[0]
        raise ConfigError(f"all {len(outcomes)} requests failed, {count} of them with: {cause}")
    seen = [outcome.milliseconds() for outcome in good]
    columns = {name: [v for s in seen if (v := s[name]) is not None] for name in seen[0]}
    pairs = [pair for o in good for pair in zip(o.stamps, o.stamps[1:], strict=False)]
    columns["itl"] = [(after - before) * 1e3 for before, after in pairs]
    tokens = sum(outcome.tokens for outcome in good)
    kept = sum(_within(s, load.goodput) for s in seen)
    return {
        "engine": "server",
        "request_rate": None if load.request_rate == float("inf") else load.request_rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "mean_concurrency": sum(o.ended - o.sent for o in good) / seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(errors),
        "seconds": seconds,
        "input_tokens": sum(outcome.prompt_tokens for outcome in good),
        "output_tokens": tokens,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": tokens / seconds,
        "goodput": dict(load.goodput),
        "goodput_per_s": kept / seconds if load.goodput else None,
        **{f"{name}_ms": percentiles(columns[name]) if columns[name] else None for name in METRICS},
    }


def _within(seen: Mapping[str, float | None], limits: Mapping[str, float]) -> bool:
    return all((seen[name] or 0.0) <= limit for name, limit in limits.items())
