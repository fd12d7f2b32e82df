"""`bench serve`: the client processes, and one row that sums up all requests of a load."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from compiledllm.benchmarks.client import (
    ClientOutcomes,
    ClientShare,
    Load,
    Outcome,
    Target,
    deal,
    first_model,
    open_session,
    send,
    send_share,
    serve_share,
)
from compiledllm.benchmarks.report import Row, percentiles
from compiledllm.benchmarks.workload import SampleRequest
from compiledllm.config import ConfigError

_WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "was", "for", "on", "are")
METRICS = ("ttft", "tpot", "itl", "e2el")


def measure_serving(
    target: Target,
    requests: Sequence[SampleRequest],
    loads: Sequence[Load],
    advance: Callable[[str], None],
    num_clients: int = 1,
) -> tuple[str, list[Row]]:
    """The model's name and a row for each load. Raises ConfigError if the server cannot be used."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError(
            "bench serve needs aiohttp, which is not installed: pip install 'compiledllm[bench]'"
        ) from None
    model = asyncio.run(_probe(target, requests[0]))
    gc.collect()
    gc.freeze()  # keeps the collector from walking imported objects while times are taken
    rows = []
    for load in loads:
        shares = deal(target, model, requests, load, num_clients)

        def advance_load(load: Load = load) -> None:
            advance(f"rate {load.request_rate:g}")

        sent = _send_all(shares, advance_load)
        wall_s = max(part.end for part in sent) - min(part.start for part in sent)
        outcomes = [outcome for part in sent for outcome in part.outcomes]
        rows.append(summarise(outcomes, load, wall_s) | {"num_clients": len(shares)})
    return model, rows


def checked_url(url: str) -> str:
    """The server's address without a path. A trailing /v1, which clients use, is dropped."""
    stripped = url.rstrip("/").removesuffix("/v1")
    if not stripped.startswith(("http://", "https://")) or "/" in stripped.partition("://")[2]:
        raise ConfigError(f"--base-url must look like http://host:port, got {url!r}")
    return stripped


def as_text(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Replace token ids by as many common words, about a token each, for an unknown tokenizer."""
    return [
        SampleRequest(" ".join(_WORDS[i % len(_WORDS)] for i in r.prompt), r.output_len)
        if isinstance(r.prompt, list)
        else r
        for r in requests
    ]


async def _probe(target: Target, request: SampleRequest) -> str:
    """Ask the server for its model's name and send one request that is not measured."""
    async with open_session(target) as session:
        model = target.model or await first_model(session, target)
        probe = await send(session, target, model, request)
        if probe.error is not None:
            raise ConfigError(f"{target.base_url}{target.endpoint}: {probe.error}")
        return model


def _send_all(shares: Sequence[ClientShare], advance: Callable[[], None]) -> list[ClientOutcomes]:
    """Send all shares at once: a single one in this process, several in a process each."""
    if len(shares) == 1:
        return [asyncio.run(send_share(shares[0], advance))]
    context = multiprocessing.get_context("spawn")
    sent = []
    with ExitStack() as stack:
        connections = []
        for share in shares:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_share, args=(theirs, share), daemon=True)
            process.start()
            theirs.close()  # the connection then ends when the child ends
            stack.callback(process.join)
            stack.callback(process.terminate)  # runs first; a child that is done is not harmed
            connections.append(stack.enter_context(ours))
        try:
            for connection in connections:
                connection.recv()
            for connection in connections:
                connection.send(None)
            for connection in connections:
                sent.append(connection.recv())
                for _ in sent[-1].outcomes:
                    advance()
        except EOFError:
            raise ConfigError("a client process ended early; its own words are above") from None
    return sent


def summarise(outcomes: Sequence[Outcome], load: Load, wall_s: float) -> Row:
    """One row for all outcomes. Raises ConfigError with the commonest cause if all failed."""
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
        "mean_concurrency": sum(o.ended - o.sent for o in good) / wall_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(errors),
        "seconds": wall_s,
        "input_tokens": sum(outcome.prompt_tokens for outcome in good),
        "output_tokens": tokens,
        "output_pieces": sum(len(outcome.stamps) for outcome in good),
        "requests_per_s": len(good) / wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "goodput": dict(load.goodput),
        "goodput_per_s": kept / wall_s if load.goodput else None,
        **{f"{name}_ms": percentiles(columns[name]) if columns[name] else None for name in METRICS},
    }


def _within(seen: Mapping[str, float | None], limits: Mapping[str, float]) -> bool:
    return all((seen[name] or 0.0) <= limit for name, limit in limits.items())
