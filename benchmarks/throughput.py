"""Offline throughput: all requests start together, and the clock stops after the last one.

Chats have further turns, which also start together: all that a chat has said, and new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compiledllm.benchmarks.floor import Ceilings, offline_floor
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.peers import Peer
from compiledllm.benchmarks.report import Row, against_floor, spread
from compiledllm.benchmarks.workload import SampleRequest, ids_of, random_requests

_WARMUP_REQUESTS, _WARMUP_TOKENS = 64, 16


@dataclass(frozen=True, slots=True)
class Chats:
    """Requests that run together, and how each of them goes on.

    num_turns: 1, or more for chats. turn_len: new tokens of each further turn's prompt. vocab_size,
    seed: of these tokens. caches: the engines have a prefix cache.
    """

    requests: Sequence[SampleRequest]
    num_turns: int
    turn_len: int
    vocab_size: int
    seed: int
    caches: bool

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of the prompt and of the answer, of all turns of all chats."""
        found = []
        for request in self.requests:
            length = len(request.prompt)
            for _ in range(self.num_turns):
                found.append((length, request.output_len))
                length += request.output_len + self.turn_len
        return found

    def first_turns(self, run: int) -> list[SampleRequest]:
        """The first turns of a run.

        With a prefix cache, prompts of different runs begin with different tokens, so that no run
        finds an earlier run's prompts in the cache.
        """
        if not self.caches:
            return list(self.requests)
        return [
            SampleRequest([(ids[0] + run) % self.vocab_size, *ids[1:]], request.output_len)
            for request in self.requests
            for ids in [ids_of(request)]
        ]

    def measure(self, peer: Peer, run: int) -> float:
        """Seconds of all turns."""
        requests = self.first_turns(run)
        generated = peer.generate(requests)
        seconds = generated.seconds
        for turn in range(1, self.num_turns):
            new = random_requests(
                len(requests), self.turn_len, 1, self.vocab_size, self.seed + turn
            )
            parts = zip(requests, generated.token_ids, new, strict=True)
            requests = [
                SampleRequest([*ids_of(said), *answer, *ids_of(more)], said.output_len)
                for said, answer, more in parts
            ]
            generated = peer.generate(requests)
            seconds += generated.seconds
        return seconds


def measure_throughput(
    peers: Sequence[Peer], chats: Chats, repeats: int, advance: Callable[[str], None]
) -> Iterator[Row]:
    """Yield a row for each engine, without floors. The engines take turns."""
    warmup = [
        SampleRequest(request.prompt, min(request.output_len, _WARMUP_TOKENS))
        for request in chats.first_turns(repeats)[:_WARMUP_REQUESTS]
    ]
    for peer in peers:
        peer.generate(warmup)
        advance(f"{peer.name}, warm-up")
    runs_s: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for run in range(repeats):
        for peer in peers:
            runs_s[peer.name].append(chats.measure(peer, run))
            advance(peer.name)
    for peer in peers:
        yield _row(peer.name, chats.lengths, runs_s[peer.name])


def _row(name: str, lengths: Sequence[tuple[int, int]], runs_s: Sequence[float]) -> Row:
    tokens_in, tokens_out = map(sum, zip(*lengths, strict=True))
    return {
        "engine": name,
        "requests": len(lengths),
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "seconds": spread(runs_s),
        "requests_per_s": spread([len(lengths) / s for s in runs_s]),
        "output_tokens_per_s": spread([tokens_out / s for s in runs_s]),
        "total_tokens_per_s": spread([(tokens_in + tokens_out) / s for s in runs_s]),
    }


def add_floor(row: Row, chats: Chats, model: Model, ceilings: Ceilings) -> None:
    """Add "floor_s", the floor of the whole run in seconds, to the row.

    Nothing with a prefix cache has a floor, as the shapes alone do not say what the cache saves.
    """
    floor = None
    if model.spec is not None and not chats.caches:
        floor = offline_floor(model.spec, ceilings, chats.lengths)
    row["floor_s"] = against_floor(floor, row["seconds"]["median"])
