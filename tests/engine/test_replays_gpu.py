"""Captured steps give the same bits however often they are replayed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compiledllm import Engine, SamplingParams
from compiledllm.graphs.buckets import StepShape
from compiledllm.runner.model_runner import ModelRunner

pytestmark = pytest.mark.gpu

NUM_REPLAYS = 10_000
CHECKED_AT_ONCE = 500  # replays between two looks at the result
DOCUMENT_LEN = 3000  # tokens: several blocks of a cluster share the keys, decode rows are split


class Repeating:
    """Replays the next step of a kind `NUM_REPLAYS` times, each time from the state before it.

    num_rows: of the step, without padding. Compares drawn tokens, logits, and the keys and values
    of all requests.
    """

    def __init__(self, runner: ModelRunner, is_decode: bool, num_rows: int) -> None:
        assert runner.graphs is not None
        self._runner, self._is_decode, self._num_rows = runner, is_decode, num_rows
        self._replay = runner.graphs.replay
        self.shape: StepShape | None = None  # of the step that was repeated

    def replay(self, shape: StepShape, inputs: np.ndarray) -> Tensor:
        if self.shape is not None or shape.is_decode != self._is_decode:
            return self._replay(shape, inputs)
        self.shape = shape
        table = self._runner.table
        state = table.last_token_ids, table.num_computed_tokens  # what a step changes
        before = [tensor.clone() for tensor in state]
        first = [tensor.clone() for tensor in self._results(shape, inputs)]
        is_changed = torch.zeros((), dtype=torch.bool, device=first[0].device)
        for turn in range(NUM_REPLAYS):
            for tensor, kept in zip(state, before, strict=True):
                tensor.copy_(kept)
            for tensor, kept in zip(self._results(shape, inputs), first, strict=True):
                is_changed |= (_bits(tensor) != _bits(kept)).any()
            if turn % CHECKED_AT_ONCE == CHECKED_AT_ONCE - 1:
                assert not is_changed, f"one of {turn + 1} replays gives other bits"
        return self._drawn

    def _results(self, shape: StepShape, inputs: np.ndarray) -> Iterator[Tensor]:
        self._drawn = self._replay(shape, inputs)
        yield self._drawn[: self._num_rows]
        yield self._runner.logits[: self._num_rows]
        for cache in self._runner.kv_caches:
            yield cache[:, 1:]  # the null block is nobody's


def _bits(x: Tensor) -> Tensor:
    """NaN, which unused memory may hold, is equal to itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.fixture(scope="module")
def engine(tiny_llama: Callable[..., Path]) -> Engine:
    model = tiny_llama(hidden_size=256, head_dim=64, max_position_embeddings=4096)
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "num_kv_blocks": 600}
    return Engine(model, dtype="bfloat16", skip_tokenizer_init=True, **limits)


@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prompt"])
def test_equal_bits(is_decode: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question on a document that the cache holds, beside rows of other lengths and samplings."""
    draw, core = random.Random(5), engine.core
    lengths = [DOCUMENT_LEN, 3, 17, 700]
    prompts = [[draw.randrange(3, 128) for _ in range(length)] for length in lengths]
    params = [
        SamplingParams(temperature=temperature, seed=7, max_tokens=200, ignore_eos=True)
        for temperature in (0, 0, 0.8, 0.8)
    ]
    ids = [engine.add_request(*request) for request in zip(prompts, params, strict=True)]
    for _ in range(20):  # to the ends of the prompts, and some tokens more
        engine.step()
    if not is_decode:
        ids.append(engine.add_request(prompts[0][: DOCUMENT_LEN - 20] + [9] * 20, params[0]))
    assert core.runner.graphs is not None
    repeating = Repeating(core.runner, is_decode, len(ids))
    monkeypatch.setattr(core.runner.graphs, "replay", repeating.replay)
    for _ in range(3):
        engine.step()
    assert repeating.shape is not None
    assert is_decode or repeating.shape.num_tokens <= 64, "the cache did not hold the document"
    for request_id in ids:
        engine.abort_request(request_id)
    while engine.has_unfinished_requests():
        engine.step()
