"""Simulates the router over replicas: its CPU time, the balance of the load, and cache hits.

    python -m compiledllm.benchmarks.routing --output-json FILE

The router is the server's own. Replicas are simulated: the durations of steps are measured ones
(`simulated_replicas.STEP`), a replica computes waiting prompts one after the other before it goes
on decoding, and its prefix cache evicts the chat that was used least recently. Clients hold chats:
they read an answer, write the next message and wait for its answer, so that a slow replica slows
its clients down.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compiledllm.benchmarks.simulated_replicas import (
    STEP,
    SYSTEM_PROMPT_TOKENS,
    VOCABULARY,
    Chat,
    Replica,
)
from compiledllm.remote.routing import PrefixRouter, hashes

MAX_CHAT_TOKENS = 6000  # then the client begins another chat
READING_S = 5.0  # mean time between an answer and the next message
NUM_SYSTEM_PROMPTS = 20  # the k-th is used in proportion to 1/k
ARRIVAL_S = 5.0  # the clients begin within this time


# -- policies --------------------------------------------------------------------------------------

Policy = Callable[[Chat, list[Replica]], int]


class Routed:
    """The server's router as a policy; measures the CPU seconds that the router takes."""

    def __init__(self, num_replicas: int) -> None:
        self._router = PrefixRouter(num_replicas)
        self.seconds, self.num_tokens, self.num_prompts = 0.0, 0, 0

    def __call__(self, chat: Chat, replicas: list[Replica]) -> int:
        outstanding: list[int | None] = [replica.outstanding for replica in replicas]
        start = time.thread_time()
        keys = hashes(chat.tokens, "")
        chosen = self._router.choose(keys, outstanding)[0]
        self._router.note(keys, chosen)
        self.seconds += time.thread_time() - start
        self.num_tokens += len(chat.tokens)
        self.num_prompts += 1
        return chosen


def round_robin() -> Policy:
    turns = itertools.count()
    return lambda chat, replicas: next(turns) % len(replicas)


def least_outstanding(chat: Chat, replicas: list[Replica]) -> int:
    return min(range(len(replicas)), key=lambda i: replicas[i].outstanding)


def longest_prefix(chat: Chat, replicas: list[Replica]) -> int:
    """The replica whose cache has most of the prompt; of equals, the least outstanding one."""
    known = [replica.known(chat) for replica in replicas]
    return min(range(len(replicas)), key=lambda i: (-known[i], replicas[i].outstanding))


@dataclass
class Result:
    """The outcome of a policy.

    hits: share of the prompts' tokens found in the replica's cache. possible: share that any
    replica had ever computed, which an oracle with endless caches would find. moved: share of the
    turns that went to another replica than the chat's turn before. imbalance: the largest number of
    outstanding tokens of a replica divided by the mean, averaged over arrivals. running: mean
    number of running requests per replica. answer_s: time from a message to the end of its answer,
    mean and 99th percentile.
    """

    policy: str
    num_prompts: int
    hits: float
    possible: float
    moved: float
    imbalance: float
    running: float
    answer_s: float
    answer_s_p99: float
    tokens_per_s: float


def simulate(
    policy: str,
    choose: Policy,
    num_replicas: int,
    num_clients: int,
    num_prompts: int,
    seed: int = 0,
) -> Result:
    """Run until `num_prompts` have been answered."""
    simulation = _Simulation(choose, num_replicas, random.Random(seed))
    simulation.run(num_clients, num_prompts)
    return simulation.result(policy)


class _Simulation:
    """Clients, replicas and a queue of events: a message is sent, or a replica finishes one."""

    def __init__(self, choose: Policy, num_replicas: int, rng: random.Random) -> None:
        self._choose, self._rng = choose, rng
        self._systems = [
            rng.choices(VOCABULARY, k=SYSTEM_PROMPT_TOKENS) for _ in range(NUM_SYSTEM_PROMPTS)
        ]
        self._replicas = [Replica() for _ in range(num_replicas)]
        self._numbers = itertools.count()
        # A heap of (seconds, number, index of a replica, its version), when a replica finishes a
        # request, or (seconds, number, -1, chat), when a client sends a message.
        self._events: list[tuple[float, int, int, Any]] = []
        self._sent_s: dict[int, float] = {}  # number of a chat -> when its last message was sent
        self._seen_systems: set[int] = set()
        self._now_s = 0.0
        self._hits = self._possible = self._prompt_tokens = self._answer_tokens = 0
        self._turns = self._moved = 0
        self._imbalances: list[float] = []  # at each message
        self._answer_s: list[float] = []  # of each answer

    def run(self, num_clients: int, num_prompts: int) -> None:
        for _ in range(num_clients):
            self._begin_chat(self._rng.uniform(0, ARRIVAL_S))
        while len(self._answer_s) < num_prompts:
            self._now_s, number, index, what = heapq.heappop(self._events)
            if index < 0:
                self._send(what, number)
            elif what == self._replicas[index].version:
                self._finish(index)

    def _begin_chat(self, at_s: float) -> None:
        chat = Chat(next(self._numbers), random.Random(self._rng.random()), self._systems)
        self._plan_message(at_s, chat)

    def _plan_message(self, at_s: float, chat: Chat) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), -1, chat))

    def _plan_finish(self, index: int) -> None:
        replica = self._replicas[index]
        event = replica.next_end_s(), next(self._numbers), index, replica.version
        heapq.heappush(self._events, event)

    def _send(self, chat: Chat, number: int) -> None:
        """A client sends a chat's next message."""
        if chat.home is not None or chat.system in self._seen_systems:
            self._possible += len(chat.tokens)
        self._seen_systems.add(chat.system)
        chat.write(chat.message_tokens())
        chosen = self._choose(chat, self._replicas)
        replica = self._replicas[chosen]
        self._hits += replica.known(chat)
        self._prompt_tokens += len(chat.tokens)
        self._turns += chat.home is not None
        self._moved += chat.home not in (None, chosen)
        chat.home, self._sent_s[chat.number] = chosen, self._now_s
        replica.add(self._now_s, number, chat, chat.answer_tokens())
        outstanding = [replica.outstanding for replica in self._replicas]
        self._imbalances.append(max(outstanding) * len(outstanding) / sum(outstanding))
        self._plan_finish(chosen)

    def _finish(self, index: int) -> None:
        """A replica finishes an answer; the client reads it and goes on or begins another chat."""
        chat, answer = self._replicas[index].finish(self._now_s)
        self._answer_tokens += answer
        self._answer_s.append(self._now_s - self._sent_s[chat.number])
        chat.write(answer)
        next_s = self._now_s + self._rng.expovariate(1 / READING_S)
        if len(chat.tokens) > MAX_CHAT_TOKENS:
            self._begin_chat(next_s)
        else:
            self._plan_message(next_s, chat)
        self._plan_finish(index)

    def result(self, policy: str) -> Result:
        answer_s = sorted(self._answer_s)
        return Result(
            policy,
            len(self._imbalances),
            self._hits / self._prompt_tokens,
            self._possible / self._prompt_tokens,
            self._moved / max(1, self._turns),
            sum(self._imbalances) / len(self._imbalances),
            sum(answer_s) / self._now_s / len(self._replicas),
            sum(answer_s) / len(answer_s),
            answer_s[len(answer_s) * 99 // 100],
            self._answer_tokens / self._now_s,
        )


def costs(num_replicas: int, num_tokens: int, count: int = 200) -> dict[str, float]:
    """Microseconds of CPU time that the router takes for a prompt of `num_tokens` tokens."""
    rng, router = random.Random(0), PrefixRouter(num_replicas)
    prompts = [rng.choices(VOCABULARY, k=num_tokens) for _ in range(count)]
    load: list[int | None] = [rng.randrange(100_000) for _ in range(num_replicas)]
    start = time.thread_time()
    for prompt in prompts * 2:
        keys = hashes(prompt, "")
        router.note(keys, router.choose(keys, load)[0])
    us = (time.thread_time() - start) / (2 * count) * 1e6
    return {"replicas": num_replicas, "tokens": num_tokens, "us": us}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=60_000)
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args(argv)
    num_replicas, routed = arguments.replicas, Routed(arguments.replicas)
    policies: dict[str, Policy] = {
        "router": routed,
        "longest prefix": longest_prefix,
        "least outstanding": least_outstanding,
        "round robin": round_robin(),
    }
    results = []
    for name, policy in policies.items():
        results.append(simulate(name, policy, num_replicas, arguments.clients, arguments.prompts))
        (_, policy_name), *figures = asdict(results[-1]).items()
        print(
            "  ".join([policy_name, *(f"{key} {figure:.3f}" for key, figure in figures)]),
            flush=True,
        )
    us = routed.seconds * 1e6
    print(
        f"the router took {us / routed.num_prompts:.0f} us a request, "
        f"{us / routed.num_tokens:.3f} us a prompt token"
    )
    table = [costs(n, tokens) for tokens in (1024, 8192, 32768) for n in (2, 16, 64)]
    for row in table:
        print(f"{row['replicas']:.0f} replicas, {row['tokens']:.0f} tokens: {row['us']:.0f} us")
    if arguments.output_json:
        found_json = {
            "results": [asdict(result) for result in results],
            "us_per_request": us / routed.num_prompts,
            "us_per_prompt_token": us / routed.num_tokens,
            "costs": table,
            "step_times": asdict(STEP),
            "replicas": num_replicas,
            "clients": arguments.clients,
        }
        arguments.output_json.write_text(json.dumps(found_json, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
