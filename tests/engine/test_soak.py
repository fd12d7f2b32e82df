"""Random arrivals, aborts and long prompts for many steps: nothing leaks, stalls or is mixed up."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine, RequestOutput, SamplingParams

VOCAB_SIZE = 128


class Traffic:
    """Requests that come and go while the engine steps; every finished one is checked."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.prompts: dict[str, tuple[list[int], SamplingParams]] = {}
        self.outputs: dict[str, list[list[int]]] = {}
        self.aborted: set[str] = set()

    def run(self, num_requests: int, max_steps: int) -> None:
        steps = 0
        while num_requests or self.engine.has_unfinished_requests():
            for _ in range(min(num_requests, self.rng.choice([0, 0, 1, 1, 2, 5]))):
                self.arrive()
                num_requests -= 1
            if self.rng.random() < 0.1:
                self.abort_one()
            for output in self.engine.step():
                if output.finished:
                    self.outputs[output.request_id] = tokens_of(output)
            steps += 1
            assert steps < max_steps, "the requests do not come to an end"
        assert set(self.prompts) == set(self.outputs) | self.aborted

    def arrive(self) -> None:
        rng = self.rng
        length = rng.choice([1, 2, rng.randrange(1, 60), rng.randrange(1, 60), 300])
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
        if rng.random() < 0.3:  # a shared beginning
            prompt = [7] * 40 + prompt
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.8]),
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=rng.randrange(1000),
            max_tokens=rng.randrange(1, 60),
            stop_token_ids=[rng.randrange(3, VOCAB_SIZE)],
            **self.rules(),
        )
        self.prompts[self.engine.add_request(prompt, params)] = prompt, params

    def rules(self) -> dict[str, Any]:
        """Nothing for most requests; one or two of what there is for the others."""
        rng = self.rng
        if rng.random() < 0.6:
            return {}
        everything = {
            "n": rng.randrange(1, 4),
            "frequency_penalty": 0.7,
            "repetition_penalty": 1.2,
            "logit_bias": {rng.randrange(VOCAB_SIZE): 4.0},
            "min_tokens": 1,
            "allowed_token_ids": rng.sample(range(3, VOCAB_SIZE), 40),
            "logits_processors": [lambda output, logits: logits * (1 + len(output) % 2)],
            "logprobs": rng.randrange(4),
            "prompt_logprobs": rng.randrange(4),
            "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
        }
        return {name: everything[name] for name in rng.sample(sorted(everything), 2)}

    def abort_one(self) -> None:
        alive = [name for name in self.prompts if name not in self.outputs]
        if alive:
            name = self.rng.choice(alive)
            self.engine.abort_request(name)
            if name not in self.outputs:
                self.aborted.add(name)


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def make(model: Path, **options: Any) -> Engine:
    """Few blocks, so that requests are preempted; a small budget, so that prompts are chunked."""
    small = {"num_kv_blocks": 40, "max_num_seqs": 9, "max_num_batched_tokens": 48}
    fixed = {"skip_tokenizer_init": True, "dtype": "float32", **small}
    return Engine(model, **(fixed | options))


def test_busy_engine_keeps_its_books(tiny_llama: Callable[..., Path]) -> None:
    engine = make(tiny_llama(), device="cpu", enforce_eager=True, async_scheduling=False)
    traffic = Traffic(engine, seed=5)
    traffic.run(num_requests=150, max_steps=20_000)
    check_books(engine)
    assert engine.core.scheduler.num_preemptions > 20
    check_against_lone_runs(engine, traffic, sample=25)


def test_so_does_one_that_runs_ahead_and_whose_layers_see_unequally_far(
    tiny_model: Callable[..., Path],
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    window = {"head_dim": 32, "sliding_window": 20, "layer_types": kinds}
    model = tiny_model("gemma3_text", **window)
    options = {"device": "cpu", "enforce_eager": True, "num_kv_blocks": 50}
    engine = make(model, async_scheduling=True, **options)
    assert len(engine.core.plan.kv_layout.windows) == 3
    traffic = Traffic(engine, seed=6)
    traffic.run(num_requests=150, max_steps=20_000)
    check_books(engine)
    assert engine.core.scheduler.num_preemptions > 20
    check_against_lone_runs(engine, traffic, sample=25)


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_busy_gpu_engine_keeps_its_books_and_its_memory(tiny_llama: Callable[..., Path]) -> None:
    engine = make(tiny_llama(), num_kv_blocks=400, max_num_seqs=64, max_num_batched_tokens=512)
    traffic = Traffic(engine, seed=1)
    traffic.run(num_requests=300, max_steps=50_000)
    before = torch.cuda.memory_allocated()
    for seed in range(2, 8):
        Traffic(engine, seed).run(num_requests=1000, max_steps=100_000)
    check_books(engine)
    # The last step's results may be alive; a leak would leave something of each of 6000 requests.
    assert torch.cuda.memory_allocated() <= before + 2**20, "device memory was leaked"
    check_against_lone_runs(engine, traffic, sample=60)


def check_books(engine: Engine) -> None:
    scheduler = engine.core.scheduler
    scheduler.check_invariants()
    assert scheduler.block_pool.num_free_blocks == scheduler.block_pool.num_blocks
    assert engine.core.runner.compiler.num_recompiles == 0
    shared = engine._shared
    assert not shared.states and not shared._unseen and not shared._book.core_ids
    assert not shared._failures


def check_against_lone_runs(engine: Engine, traffic: Traffic, sample: int) -> None:
    """What a request got in the crowd is what it gets alone."""
    for name in random.Random(0).sample(sorted(traffic.outputs), sample):
        prompt, params = traffic.prompts[name]
        (output,) = engine.generate([prompt], [params], use_tqdm=False)
        assert tokens_of(output) == traffic.outputs[name], params
