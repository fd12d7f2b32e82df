"""Throughput of requests that go on as chats."""

from __future__ import annotations

import fcntl
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compiledllm.benchmarks import engines
from compiledllm.benchmarks.throughput import Chats, measure_throughput
from compiledllm.benchmarks.workload import Generated, SampleRequest, ids_of
from compiledllm.platform import Platform

REQUESTS = [SampleRequest([1, 2, 3], 2), SampleRequest([1, 2, 9, 9], 1)]


class Scripted:
    """A peer that answers with sevens in a second, and remembers its prompts."""

    name = "scripted"

    def __init__(self) -> None:
        self.prompts: list[list[list[int]]] = []

    def generate(self, requests: list[SampleRequest]) -> Generated:
        self.prompts.append([ids_of(request) for request in requests])
        return Generated(1.0, [[7] * request.output_len for request in requests])


def measured(chats: Chats, repeats: int) -> tuple[Scripted, dict[str, Any]]:
    peer: Any = Scripted()
    (row,) = measure_throughput([peer], chats, repeats, lambda _: None)
    return peer, row


def test_a_turn_is_the_chat_so_far_and_new_tokens() -> None:
    peer, row = measured(Chats(REQUESTS, 3, 4, 100, 0, caches=True), 1)
    _, first, second, third = peer.prompts
    assert first == [[1, 2, 3], [1, 2, 9, 9]]
    for before, after, request in zip(first + second, second + third, REQUESTS * 2, strict=True):
        assert after[: len(before)] == before
        answer = [7] * request.output_len
        assert after[len(before) : len(before) + request.output_len] == answer
        assert len(after) == len(before) + request.output_len + 4
    lengths = [len(ids) for prompts in (first, second, third) for ids in prompts]
    assert (row["requests"], row["input_tokens"]) == (6, sum(lengths))
    assert (row["output_tokens"], row["seconds"]["median"]) == (9, 3)


def test_no_run_finds_an_earlier_runs_prompts_in_a_cache() -> None:
    peer, _ = measured(Chats(REQUESTS, 1, 4, 100, 0, caches=True), 3)
    assert len({prompts[0][0] for prompts in peer.prompts}) == 4  # also the warm-up
    for prompts in peer.prompts:  # but requests still share what they shared
        assert prompts[0][:2] == prompts[1][:2]
    peer, _ = measured(Chats(REQUESTS, 1, 4, 100, 0, caches=False), 2)
    assert all(prompts == [[1, 2, 3], [1, 2, 9, 9]] for prompts in peer.prompts)


def test_benchmarks_with_one_lock_load_together_and_measure_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, loaded, measures = tmp_path / "lock", threading.Event(), threading.Event()
    monkeypatch.setattr(engines, "_load", lambda *_: loaded.set() or [])

    model: Any = SimpleNamespace(platform=Platform.detect("cpu"))

    def benchmark() -> None:
        with engines.measuring(Namespace(lock=path), model):
            measures.set()

    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another benchmark loads
        thread = threading.Thread(target=benchmark)
        thread.start()
        assert loaded.wait(30)
        assert not measures.wait(0.2)
    assert measures.wait(30)
    thread.join()
