"""Greedy output of the real default model equals transformers', however the engine gets there.

float32, 20 prompts of 1 to 600 tokens with 32 new tokens each where all run at once. Where a test
is about how the engine gets there, fewer of both, and of the model's layers the first six of 30.
transformers judges a prompt and its answer in one forward: each new token must have the largest
logit of its position, up to TIE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from compiledllm import Engine, SamplingParams
from compiledllm.outputs import RequestOutput
from tests.support.greedy import load_reference
from tests.support.tiny import save_first_layers

pytestmark = pytest.mark.real_model

NUM_NEW = 32
TIE = 2e-3
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 48, 64, 100, 160, 255, 320, 450, 600)
TEXTS = (
    "The tower was built in 1889 and stands 330 metres tall. It was meant to last twenty years. ",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n",
    "Q: What is the boiling point of water?\nA: 100 degrees Celsius, at sea level.\nQ: ",
    "Es war einmal ein König, der hatte zwölf Töchter. Il était une fois une forêt très ancienne. ",
    "| name | age | city |\n|---|---|---|\n| Ann | 34 | Oslo |\n| Bo | 29 | 東京 |\n",
)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW)


@dataclass
class Reference:
    """transformers on the same checkpoint. Prompts are known by their lengths, which differ.

    has_losses: whether the losses of prompts are computed, for which the head sees every token.
    """

    checkpoint: Path
    model: Any
    prompts: dict[int, list[int]]
    has_losses: bool
    judged: dict[int, list[list[int]]] = field(default_factory=dict)  # answers that are greedy
    losses: dict[int, float] = field(default_factory=dict)  # sums over the prompt's tokens

    def of(self, *lengths: int) -> list[list[int]]:
        return [self.prompts[length] for length in lengths]

    def assert_greedy(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            length, answer = len(output.prompt_token_ids), output.outputs[0].token_ids
            judged = self.judged.setdefault(length, [])
            if not any(longer[: len(answer)] == answer for longer in judged):
                self._judge(length, answer)
                judged.append(answer)
            is_over = answer[-1] == self.model.config.eos_token_id
            assert output.outputs[0].finish_reason == ("stop" if is_over else "length")
        different = {tuple(output.outputs[0].token_ids) for output in outputs}
        assert len(different) > len(outputs) / 2, "nearly the same for every prompt"

    def loss_of(self, length: int) -> float:
        """The sum of negative log probabilities of the prompt's tokens, but for the first."""
        if length not in self.losses:
            self._judge(length, [])
        return self.losses[length]

    @torch.inference_mode()
    def _judge(self, length: int, answer: list[int]) -> None:
        """One forward over prompt and answer, without a cache."""
        tokens = torch.tensor([*self.prompts[length], *answer])
        kept = len(tokens) if self.has_losses else len(answer) + 1
        logits = self.model(tokens[None], use_cache=False, logits_to_keep=kept).logits[0, :-1]
        prompt, chosen = tokens[1:length], tokens[length:]
        if self.has_losses:
            loss = F.cross_entropy(logits[: length - 1], prompt, reduction="sum")
            self.losses[length] = loss.item()
        logits = logits[len(logits) - len(answer) :]
        best, own = logits.max(-1).values, logits.gather(1, chosen[:, None])[:, 0]
        for place, gap in enumerate((best - own).tolist()):
            where = f"prompt of {length} tokens, new token {place}"
            assert gap < TIE, f"{where}: {answer[place]} is {gap} below the best: not a tie"
            if gap:
                print(f"tie at {where}: {answer[place]} is {gap:.6f} below the best")


@pytest.fixture(scope="module")
def whole(default_model: Path) -> Reference:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model)
    prompts = {}
    for index, length in enumerate(LENGTHS):
        ids: list[int] = tokenizer.encode(TEXTS[index % len(TEXTS)] * 60)
        prompts[length] = ids[index : index + length]
        assert len(prompts[length]) == length
    return Reference(default_model, load_reference(default_model), prompts, has_losses=True)


@pytest.fixture(scope="module")
def shallow(whole: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Of the model's first layers."""
    folder = tmp_path_factory.mktemp("first_layers")
    save_first_layers(whole.checkpoint, folder, 6)
    return Reference(folder, load_reference(folder), whole.prompts, has_losses=False)


@pytest.fixture(scope="module")
def eager(default_model: Path) -> Iterator[Engine]:
    yield make(default_model, enforce_eager=True, enable_prefix_caching=False)


def make(checkpoint: Path, **options: Any) -> Engine:
    return Engine(checkpoint, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def together(eager: Engine, whole: Reference) -> list[RequestOutput]:
    """The answers to all prompts at once, and the log probabilities of the prompts."""
    return eager.generate(whole.of(*LENGTHS), replace(GREEDY, prompt_logprobs=0))


def test_all_at_once(together: list[RequestOutput], whole: Reference) -> None:
    whole.assert_greedy(together)


def test_alone(eager: Engine, whole: Reference) -> None:
    """One row takes a step for each token, so that these are few."""
    few = SamplingParams(temperature=0, max_tokens=10)
    prompts = whole.of(1, 15, 16, 17, 600)
    whole.assert_greedy([output for prompt in prompts for output in eager.generate(prompt, few)])


def test_chunked_prefill(shallow: Reference) -> None:
    engine = make(shallow.checkpoint, enforce_eager=True, max_num_batched_tokens=32)
    prompts = shallow.of(1, 5, 15, 16, 17, 31, 32, 33, 64, 255)
    shallow.assert_greedy(engine.generate(prompts, GREEDY))
    engine.core.scheduler.check_invariants()


def test_perplexity(together: list[RequestOutput], whole: Reference) -> None:
    """Of all prompts together, as the engine's log probabilities of prompts tell it."""
    prompts = whole.of(*LENGTHS[1:])
    ours, theirs, count = 0.0, 0.0, 0
    for prompt, output in zip(prompts, together[1:], strict=True):
        found = output.prompt_logprobs
        assert found is not None and len(found) == len(prompt)
        pairs = list(zip(prompt[1:], found[1:], strict=True))
        ours -= sum(position[token].logprob for token, position in pairs if position is not None)
        theirs += whole.loss_of(len(prompt))
        count += len(pairs)
    perplexities = math.exp(ours / count), math.exp(theirs / count)
    assert count > 2000 and perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)


def test_preemption(shallow: Reference) -> None:
    engine = make(shallow.checkpoint, enforce_eager=True, num_kv_blocks=40)
    shallow.assert_greedy(engine.generate(shallow.of(*LENGTHS[:16]), GREEDY))
    assert engine.core.scheduler.num_preemptions > 0
    engine.core.scheduler.check_invariants()


def test_shared_prefixes(shallow: Reference) -> None:
    """The second round finds every full block of its prompts, and of what was generated."""
    engine = make(shallow.checkpoint, enforce_eager=True)
    lengths = (1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 255)
    prompts = shallow.of(*lengths)
    shallow.assert_greedy(engine.generate(prompts, GREEDY))
    again = engine.generate(prompts, GREEDY)
    shallow.assert_greedy(again)
    assert [output.num_cached_tokens for output in again] == [
        (length - 1) // 16 * 16 for length in lengths
    ]
    prompt, answer = prompts[-1], again[-1].outputs[0].token_ids
    (longer,) = engine.generate(prompt + answer[:28], SamplingParams(temperature=0, max_tokens=4))
    assert longer.outputs[0].token_ids == answer[28:32]
    assert longer.num_cached_tokens > len(prompt)


def test_compiled(shallow: Reference) -> None:
    """Prefill, one-row and crowded decode through the compiled block, without recompiling."""
    engine = make(shallow.checkpoint, compile_when="start")
    compiler = engine.core.runner.compiler
    assert compiler.is_ready and compiler.error is None
    shallow.assert_greedy(engine.generate(shallow.of(*LENGTHS[:16], 320), GREEDY))
    few = SamplingParams(temperature=0, max_tokens=16)
    alone = [engine.generate(prompt, few)[0] for prompt in shallow.of(1, 16, 320)]
    shallow.assert_greedy(alone)
    assert compiler.num_recompiles == 0
