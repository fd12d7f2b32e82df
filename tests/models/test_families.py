"""Every family and variant against transformers: float32 logits, however the tokens are fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compiledllm.config import ConfigError
from compiledllm.kernels.attention import AttentionMetadata
from compiledllm.models.decoder import Decoder
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from compiledllm.runner.kv_cache import allocate_kv_caches

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Family and variant -> config changes.
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "gqa"): {},
    ("llama", "mha"): {"num_key_value_heads": 4},
    ("llama", "mqa"): {"num_key_value_heads": 1},
    ("llama", "bias"): {"attention_bias": True, "mlp_bias": True},
    ("llama", "tied"): {"tie_word_embeddings": True},
    ("llama", "head_dim"): {"head_dim": 32},
    ("llama", "llama3_rope"): {"rope_parameters": LLAMA3_ROPE},
    ("llama", "linear_rope"): {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    ("qwen3", "gqa"): {"head_dim": 16},
    ("qwen3", "bias"): {"head_dim": 32, "attention_bias": True},
    ("qwen3", "tied"): {"head_dim": 16, "tie_word_embeddings": True},
}
BLOCK_SIZE = 16
NUM_TOKENS = 150


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), "torch")
    load_weights(model, checkpoint)
    return model


@torch.inference_mode()
def logits_in_chunks(model: Decoder, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every token, fed in chunks of these sizes through scattered KV blocks."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    block_table = torch.randperm(num_blocks, dtype=torch.int32)[None] + 1
    caches = allocate_kv_caches(
        model.spec, num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu")
    )
    outputs, start = [], 0
    for size in chunks:
        positions = torch.arange(start, start + size)
        slots = block_table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE
        attn = AttentionMetadata(
            slot_mapping=slots + positions % BLOCK_SIZE,
            block_tables=block_table,
            seq_lens=torch.tensor([start + size], dtype=torch.int32),
            query_start_loc=torch.tensor([0, size], dtype=torch.int32),
        )
        ids = torch.tensor(token_ids[start : start + size])
        outputs.append(model.compute_logits(model(ids, positions, caches, attn)))
        start += size
    return torch.cat(outputs)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_logits_equal_transformers(
    family: str, variant: str, tiny_model: Callable[..., Path]
) -> None:
    checkpoint = tiny_model(family, **VARIANTS[family, variant])
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    model = load(checkpoint)
    for chunks in ([NUM_TOKENS], [1] * NUM_TOKENS, [7, 1, 64, 1, 1, 33, 43]):
        actual = logits_in_chunks(model, token_ids, chunks)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_parameter_count_follows_from_the_spec(tiny_model: Callable[..., Path]) -> None:
    for (family, _), changes in VARIANTS.items():
        model = load(tiny_model(family, **changes))
        assert model.spec.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 10000.0,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_type='dynamic'",
        ),
    ],
)
def test_unknown_variant_refuses_to_load_and_names_the_field(
    family: str, changes: dict[str, Any], named: str, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_spec(tiny_model(family, **changes))
