"""Which replica a prompt goes to: the one that knows its beginning, unless too much waits there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from compiledllm.config import ConfigError
from compiledllm.remote import routing
from compiledllm.remote.replicas import gpus_of_replicas
from compiledllm.remote.routing import (
    KNOWN_TOKEN_WEIGHT,
    MAX_LEAD,
    PIECE,
    PrefixRouter,
    hashes,
)

OUTPUT = 200  # tokens of each answer


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def test_an_unknown_prompt_goes_where_least_waits() -> None:
    router = PrefixRouter(3)
    assert router.choose(hashes(prompt(0, 500), ""), [30, 10, 20]) == [1, 2, 0]
    assert router.choose(hashes(prompt(0, 500), ""), [30, None, 20]) == [2, 0]
    assert router.choose(hashes(prompt(0, 500), ""), [None] * 3) == []


def test_the_longest_known_prefix_decides() -> None:
    router, first = PrefixRouter(2), prompt(0, 10 * PIECE)
    router.note(hashes(first[: 3 * PIECE], ""), 0)
    router.note(hashes(first[: 5 * PIECE], ""), 1)
    assert router.choose(hashes(first, ""), [0, 0]) == [1, 0]
    assert router.choose(hashes(first, "another key's"), [0, 1]) == [0, 1]
    assert router.choose(hashes([1, *first], ""), [0, 1]) == [0, 1], "not a prefix"
    router.forget(1)
    assert router.choose(hashes(first, ""), [0, 0]) == [0, 1]
    router.forget()
    assert router.choose(hashes(first, ""), [1, 0]) == [1, 0]


def test_routers_of_other_processes_know_a_prompt_by_its_keys() -> None:
    router, known = PrefixRouter(2), prompt(0, 3 * PIECE)
    router.note(hashes(known, "a key's"), 1)
    assert router.choose(hashes(known, "a key's"), [0, 0]) == [1, 0]
    assert router.choose(hashes(known, "another key's"), [0, 0]) == [0, 1]
    code = "from compiledllm.remote.routing import hashes; print(*hashes([1] * 40, 'salt'))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    shown = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert shown.split() == [str(key) for key in hashes([1] * 40, "salt")]


def test_too_long_a_queue_outweighs_a_known_prefix() -> None:
    router, known = PrefixRouter(2), prompt(0, 2 * PIECE)
    router.note(hashes(known, ""), 0)
    assert router.choose(hashes(known, ""), [MAX_LEAD, 0])[0] == 0, "a chat goes on"
    assert router.choose(hashes(known, ""), [MAX_LEAD + 1, 0])[0] == 1
    router.note(hashes([*known, 5], ""), 0)  # as many prompts begin
    limit = KNOWN_TOKEN_WEIGHT * 2 * PIECE
    assert router.choose(hashes(known, ""), [limit - 1, 0])[0] == 0
    assert router.choose(hashes(known, ""), [limit + 1, 0])[0] == 1


def test_memory_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAX_BEGINNINGS", 1)
    router, old, new = PrefixRouter(2), prompt(0, 8 * PIECE), prompt(1, 8 * PIECE)
    router.note(hashes(old, ""), 0)
    router.note(hashes(new, ""), 0)
    assert router.choose(hashes(old, ""), [1, 0])[0] == 1
    assert router.choose(hashes(new, ""), [1, 0])[0] == 0


def test_a_replica_that_started_again_is_known_by_what_it_was_given_since() -> None:
    router, before, after = PrefixRouter(3), prompt(0, 300), prompt(1, 300)
    router.note(hashes(before, ""), 1)
    for _ in range(100):
        router.forget(1)
    router.note(hashes(after, ""), 1)
    assert router.choose(hashes(before, ""), [0, 1, 2]) == [0, 1, 2]
    assert router.choose(hashes(after, ""), [0, 1, 2]) == [1, 0, 2]


@pytest.mark.parametrize("num_replicas", [2, 8])
def test_chats_with_a_common_system_prompt_stay_and_are_spread(num_replicas: int) -> None:
    """Turns of 64 chats at random; each answer takes as long as eight other turns take to come."""
    rng, router = random.Random(5), PrefixRouter(num_replicas)
    system = prompt(99, 600)
    chats = {i: list(system) for i in range(64)}
    home: dict[int, int] = {}
    outstanding, running = [0] * num_replicas, []
    moved, turns, counts = 0, 0, Counter[int]()
    for _ in range(3000):
        chat = rng.randrange(64)
        tokens = chats[chat]
        tokens += rng.choices(range(1000), k=rng.randrange(20, 200))
        replica = router.choose(hashes(tokens, ""), outstanding)[0]
        router.note(hashes(tokens, ""), replica)
        turns += chat in home
        moved += chat in home and home[chat] != replica
        home[chat], work = replica, len(tokens) + OUTPUT
        counts[replica] += 1
        outstanding[replica] += work
        running.append((replica, work))
        if len(running) > 8 * num_replicas:
            done, less = running.pop(0)
            outstanding[done] -= less
        tokens += rng.choices(range(1000), k=OUTPUT)
        if len(tokens) > 6000:  # the chat ends, and another begins
            chats[chat] = list(system)
            del home[chat]
    assert moved / turns <= 0.05
    assert max(counts.values()) < 1.5 * 3000 / num_replicas


def test_each_replica_has_gpus_of_its_own() -> None:
    of = gpus_of_replicas(2, 2, None)
    assert [found["CUDA_VISIBLE_DEVICES"] for found in of] == ["0,1", "2,3"]
    of = gpus_of_replicas(3, 1, "4,5,7,6")
    assert [found["CUDA_VISIBLE_DEVICES"] for found in of] == ["4", "5", "7"]
    with pytest.raises(ConfigError, match="needs 4 GPUs.*names 3; at most 1 replicas fit"):
        gpus_of_replicas(2, 2, "0,1,2")
