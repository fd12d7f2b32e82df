"""The prefix cache of models with states: what is found, and that it changes no token."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import Engine, SamplingParams
from compiledllm.scheduler.state_keeper import StateKeeper
from tests.support.families import IN_ENGINE, VARIANTS

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture
def make_model(tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        variant = VARIANTS[family, IN_ENGINE[family]]
        return tiny_model(family, **variant, max_position_embeddings=2048)

    return make


@pytest.fixture
def model(make_model: Callable[[str], Path]) -> Path:
    return make_model("qwen3_next")


def engine_of(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    return Engine(checkpoint, **({"num_kv_blocks": 400, "enforce_eager": True} | fixed | options))


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=count)


class Talk:
    """Asks an engine, and one without a prefix cache, which must answer the same."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.engine = engine_of(model, **options)
        self._plain = engine_of(model, enable_prefix_caching=False)
        assert self.keeper.snapshots.num_slots > 0

    @property
    def keeper(self) -> StateKeeper:
        keeper = self.engine.core.scheduler.kv.states
        assert keeper is not None
        return keeper

    def ask(self, *prompts: list[int]) -> tuple[list[int], list[list[int]]]:
        """The numbers of cached tokens and the answers."""
        outputs = self.engine.generate(prompts, GREEDY, use_tqdm=False)
        self.engine.core.scheduler.check_invariants()
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        plain = self._plain.generate(prompts, GREEDY, use_tqdm=False)
        assert answers == [output.outputs[0].token_ids for output in plain]
        return [output.num_cached_tokens or 0 for output in outputs], answers

    def cached(self, *prompts: list[int]) -> list[int]:
        return self.ask(*prompts)[0]


BEHIND_THE_PROMPT = [
    ("qwen3_next", {"async_scheduling": True}),
    ("lfm2", {"max_num_batched_tokens": 96}),
    ("granitemoehybrid", {}),
]


@pytest.mark.parametrize(("family", "options"), BEHIND_THE_PROMPT)
def test_a_second_request_starts_behind_the_prompt_of_the_first(
    family: str, options: dict[str, Any], make_model: Callable[[str], Path]
) -> None:
    talk, shared = Talk(make_model(family), **options), tokens_of(500)
    assert talk.cached(shared) == [0]
    assert talk.cached(shared) == [496]
    assert talk.engine.reset_prefix_cache() and len(talk.keeper.snapshots) == 0
    assert talk.cached(shared) == [0]
    assert talk.cached(shared + tokens_of(40, 1), shared + tokens_of(70, 2)) == [496, 496]


def test_the_next_turn_of_a_conversation_starts_at_the_end_of_the_answer(model: Path) -> None:
    talk, prompt, num_computed = Talk(model), tokens_of(150), 0
    for turn in range(3):
        (num_cached,), (answer,) = talk.ask(prompt)
        assert num_cached == num_computed // 16 * 16
        num_computed = len(prompt) + len(answer) - 1  # the last token was never fed
        prompt = prompt + answer + tokens_of(60, turn + 1)


def test_a_third_request_starts_where_the_second_left_the_first(model: Path) -> None:
    talk, shared = Talk(model), tokens_of(300)
    one, two, three = (shared + tokens_of(200, seed) for seed in (1, 2, 3))
    assert talk.cached(one) == [0]
    assert talk.cached(two) == [0]  # KV of 288 tokens is there, and no state behind it
    assert talk.engine.core.scheduler.num_prefix_misses_of_state == 288
    assert talk.cached(three) == [288]
    core = talk.engine.core
    assert core.scheduler.kv.num_snapshot_hits == 1
    assert core.snapshot_bytes == len(talk.keeper.snapshots) * core.spec.bytes_per_request > 0
    assert talk.cached(one, two, three) == [496, 496, 496]


def test_short_prefixes_take_no_steps_and_no_snapshots(model: Path) -> None:
    talk = Talk(model, max_num_seqs=1)
    prompts = [tokens_of(32) + tokens_of(20, seed) for seed in range(4)]
    assert talk.cached(*prompts) == [0, 0, 0, 0]
    assert len(talk.keeper.snapshots) == 0


def test_completions_of_one_prompt_compute_it_once(model: Path) -> None:
    engine, plain = engine_of(model), engine_of(model, enable_prefix_caching=False)
    params = SamplingParams(temperature=1.5, seed=3, n=4, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompt = tokens_of(200)
    (output,) = engine.generate([prompt], params, use_tqdm=False)
    (wanted,) = plain.generate([prompt], params, use_tqdm=False)
    tokens = [completion.token_ids for completion in output.outputs]
    assert tokens == [completion.token_ids for completion in wanted.outputs]
    scheduler = engine.core.scheduler
    assert scheduler.num_prefix_hits == 3 * 192 and scheduler.kv.states is not None
    assert scheduler.kv.states.snapshots.num_hits == 3


def traffic(seed: int) -> list[list[list[int]]]:
    """Batches of prompts: new ones, repeated ones, and such that share beginnings."""
    rng, known = random.Random(seed), [tokens_of(120, 99)]
    batches = []
    for _ in range(8):
        batch = []
        for _ in range(rng.randint(1, 5)):
            base = rng.choice(known)
            own = rng.choices(range(3, 128), k=rng.randint(1, 90))
            batch.append(base[: rng.randint(1, len(base))] + own if rng.random() < 0.8 else base)
        known += [prompt for prompt in batch if len(prompt) < 300]
        batches.append(batch)
    return batches


MIXED_TRAFFIC: list[tuple[str, dict[str, Any], int]] = [
    ("lfm2", {}, 3),  # evicted
    ("qwen3_next", {"num_kv_blocks": 40, "max_num_batched_tokens": 80}, 4),  # preempted
    ("granitemoehybrid", {"num_kv_blocks": 40, "async_scheduling": True, "max_num_seqs": 3}, 6),
]


@pytest.mark.parametrize(("family", "options", "num_slots"), MIXED_TRAFFIC)
def test_no_slot_leaks_and_no_token_changes_under_mixed_traffic(
    family: str,
    options: dict[str, Any],
    num_slots: int,
    make_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "compiledllm.runner.plan.Plan.num_snapshots",
        lambda plan, _: num_slots if plan.snapshot_share else 0,
    )
    talk = Talk(make_model(family), **options)
    for batch in traffic(len(str(options))):
        talk.ask(*batch)
    snapshots, scheduler = talk.keeper.snapshots, talk.engine.core.scheduler
    assert snapshots.num_hits > 0 and scheduler.num_prefix_hits > 0
    assert len(snapshots) <= snapshots.num_slots == num_slots
    assert scheduler.block_pool.num_free_blocks == scheduler.block_pool.num_blocks
