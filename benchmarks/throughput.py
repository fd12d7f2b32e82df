"""Offline throughput: all requests start together, and the clock stops after the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from compiledllm.benchmarks.floor import Ceilings, offline_floor
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.peers import Peer
from compiledllm.benchmarks.report import Row, against_floor, spread
from compiledllm.benchmarks.workload import SampleRequest

_WARMUP_REQUESTS, _WARMUP_TOKENS = 64, 16


def measure_throughput(
    peers: Sequence[Peer],
    requests: Sequence[SampleRequest],
    repeats: int,
    advance: Callable[[str], None],
) -> Iterator[Row]:
    """Yield a row for each engine, without floors. The engines take turns."""
    warmup = [
        SampleRequest(request.prompt, min(request.output_len, _WARMUP_TOKENS))
        for request in requests[:_WARMUP_REQUESTS]
    ]
    for peer in peers:
        peer.generate(warmup)
        advance(f"{peer.name}, warm-up")
    runs_s: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(repeats):
        for peer in peers:
            runs_s[peer.name].append(peer.generate(requests))
            advance(peer.name)
    for peer in peers:
        yield _row(peer.name, requests, runs_s[peer.name])


def _row(name: str, requests: Sequence[SampleRequest], runs_s: Sequence[float]) -> Row:
    tokens_in = sum(len(request.prompt) for request in requests)
    tokens_out = sum(request.output_len for request in requests)
    return {
        "engine": name,
        "requests": len(requests),
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "seconds": spread(runs_s),
        "requests_per_s": spread([len(requests) / s for s in runs_s]),
        "output_tokens_per_s": spread([tokens_out / s for s in runs_s]),
        "total_tokens_per_s": spread([(tokens_in + tokens_out) / s for s in runs_s]),
    }


def add_floor(
    row: Row, requests: Sequence[SampleRequest], model: Model, ceilings: Ceilings
) -> None:
    """Add "floor_s", the floor of the whole run in seconds, to the row."""
    lengths = [(len(request.prompt), request.output_len) for request in requests]
    floor = None
    if model.spec is not None:
        floor = offline_floor(model.spec, ceilings, lengths)
    row["floor_s"] = against_floor(floor, row["seconds"]["median"])
