"""Every family through the engine: mixed batches, chunks and compiled blocks give greedy tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from compiledllm import Engine, SamplingParams
from compiledllm.runner import model_runner

READS_CLAMP = hasattr(GptOssConfig(), "swiglu_alpha")  # older ones have constants
SLIDING = {
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"pad_token_id": 0, "use_qk_norm": True, "logit_scale": 0.3},
    "falcon": {"ffn_hidden_size": 112},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 24} | SLIDING,
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 24} | SLIDING,
    "gemma3": {"head_dim": 32} | SLIDING,
    "gpt2": {"n_positions": 512},
    "gpt_neox": {},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 20,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "swiglu_limit": 0.6 if READS_CLAMP else 7.0,
    },
    "granite": {"residual_multiplier": 0.4, "logits_scaling": 2.5},
    "llama": {},
    "mistral": {"sliding_window": 20},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "olmo2": {"pad_token_id": 0},
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 40, "pad_token_id": 1}
    | {"do_layer_norm_before": False, "tie_word_embeddings": True},  # as the 350M model
    "phi": {},
    "phi3": {"pad_token_id": 0, "sliding_window": 20},
    "qwen2": {"use_sliding_window": True} | SLIDING,
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    "stablelm": {"qk_layernorm": True},
    "starcoder2": {"sliding_window": 20},
}
LENGTHS, NUM_TOKENS = [1, 5, 17, 40, 100, 170], 10
PROMPTS = [[random.Random(n).randrange(3, 128) for _ in range(n)] for n in LENGTHS]


def make(checkpoint: Path, **options: Any) -> Engine:
    fixed = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    return Engine(checkpoint, num_kv_blocks=100, **fixed, **options)


def greedy(engine: Engine) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    family: str,
    tiny_model: Callable[..., Path],
    greedy_by_transformers: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last block for the ends of prompts only, in steps that are large enough.
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_ENDS", 30)
    checkpoint = tiny_model(family, **FAMILIES[family])
    engine = make(checkpoint, enforce_eager=True, max_num_batched_tokens=48)  # chunks, mixed steps
    assert greedy(engine) == greedy_by_transformers(checkpoint, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "gpt_neox", "gpt_oss", "opt", "qwen3_moe"])
def test_compiled_blocks_give_the_same_tokens(
    family: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_model(family, **FAMILIES[family])
    wanted = greedy(make(checkpoint, enforce_eager=True))
    engine = make(checkpoint, compile_when="start")
    assert engine.core.runner.compiler.is_ready
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_ENDS", 30)
    assert greedy(engine) == wanted
    assert engine.core.runner.compiler.num_recompiles == 0
