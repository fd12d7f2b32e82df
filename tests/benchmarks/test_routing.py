"""The simulation of replicas: each policy to the same end, and the router's share of prefixes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from compiledllm.benchmarks import routing, simulated_replicas
from compiledllm.benchmarks.routing import Routed, longest_prefix, main, simulate
from compiledllm.benchmarks.simulated_replicas import Chat, Replica, StepTimes


def test_chats_stay_and_find_their_prefix_again() -> None:
    found = simulate("router", Routed(4), 4, 100, 1500)
    assert found.num_prompts >= 1500
    assert found.moved <= 0.05 and 0.95 * found.possible <= found.hits <= found.possible
    assert 1 <= found.imbalance < 2


def test_a_request_takes_its_prompt_and_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_replicas, "STEP", StepTimes(0.1, 0.05, 0.001))
    replica, (chat, other) = (
        Replica(),
        (Chat(n, random.Random(n), [[1] * 600]) for n in range(2)),
    )
    replica.add(0.0, 0, chat, 10)
    assert replica.next_end_s() == pytest.approx(0.6 + 10 * 0.1)
    replica.add(1.1, 1, other, 10)  # five tokens later, with the system prompt in the cache
    assert replica.known(other) == 600
    assert replica.next_end_s() == pytest.approx(1.1 + 5 * 0.15)
    assert replica.finish(1.85)[0] is chat
    assert replica.next_end_s() == pytest.approx(1.85 + 5 * 0.1)
    assert longest_prefix(chat, [Replica(), replica]) == 1


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "costs", lambda n, tokens: {"replicas": n, "tokens": 1, "us": 1})
    words = ["--replicas", "2", "--clients", "20", "--prompts", "50"]
    assert main([*words, "--output-json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["policy"] for row in found["results"]] == [
        "router",
        "longest prefix",
        "least outstanding",
        "round robin",
    ]
