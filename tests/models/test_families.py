"""Every family and variant against transformers: float32 logits, however the tokens are fed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compiledllm import cli
from compiledllm.config import ConfigError
from compiledllm.kernels.attention import make_backend
from compiledllm.kernels.backend import AttentionMetadata
from compiledllm.models.cache_groups import whole_contexts
from compiledllm.models.decoder import Decoder, Ends
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from compiledllm.runner.kv_cache import allocate_kv_caches

READS_CLAMP = hasattr(GptOssConfig(), "swiglu_alpha")  # older ones have constants

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
# Family and variant -> config changes.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "original_max_position_embeddings": 64,
}
GPT_OSS = {
    "head_dim": 16,
    "sliding_window": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Family and variant -> config changes.
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "gqa"): {},
    ("llama", "mha"): {"num_key_value_heads": 4},
    ("llama", "mqa"): {"num_key_value_heads": 1},
    ("llama", "bias"): {"attention_bias": True, "mlp_bias": True},
    ("llama", "tied"): {"tie_word_embeddings": True},
    ("llama", "head_dim"): {"head_dim": 32},
    ("llama", "gelu"): {"hidden_act": "gelu"},
    ("llama", "llama3_rope"): {"rope_parameters": LLAMA3_ROPE},
    ("llama", "yarn_rope"): {"rope_parameters": YARN},
    ("llama", "linear_rope"): {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    ("llama", "dynamic_rope"): {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    },
    ("qwen3", "gqa"): {"head_dim": 16},
    ("qwen3", "bias"): {"head_dim": 32, "attention_bias": True},
    ("qwen3", "tied"): {"head_dim": 16, "tie_word_embeddings": True},
    ("qwen3", "window"): {"head_dim": 16, "sliding_window": 20, "use_sliding_window": True}
    | HALF_SLIDING,
    ("qwen2", "gqa"): {},
    ("qwen2", "yarn"): {"rope_parameters": YARN},
    ("qwen2", "window"): {"sliding_window": 20, "use_sliding_window": True} | HALF_SLIDING,
    ("qwen2_moe", "shared"): EXPERTS | {"shared_expert_intermediate_size": 40},
    ("qwen2_moe", "some dense"): EXPERTS
    | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "norm_topk_prob": True},
    ("qwen3_moe", "renormalised"): EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    ("qwen3_moe", "every second"): EXPERTS | {"head_dim": 16, "decoder_sparse_step": 2},
    ("mixtral", "experts"): {"num_local_experts": 6, "num_experts_per_tok": 2},
    ("mistral", "full"): {"sliding_window": None, "head_dim": 32},
    ("mistral", "window"): {"sliding_window": 20},
    ("ministral", "window"): {"sliding_window": 20, "head_dim": 16} | HALF_SLIDING,
    ("smollm3", "nope"): {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    ("granite", "multipliers"): {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
    },
    ("olmo2", "gqa"): {"pad_token_id": 0},
    ("phi3", "full"): {"pad_token_id": 0},
    ("phi3", "window, partial"): {
        "pad_token_id": 0,
        "sliding_window": 20,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    ("phi3", "longrope"): {
        "pad_token_id": 0,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 64,
    },
    ("gemma", "mqa"): {"num_key_value_heads": 1, "head_dim": 32},
    ("gemma2", "windows"): {
        "head_dim": 32,
        "sliding_window": 20,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }
    | HALF_SLIDING,
    ("gemma3_text", "windows"): {
        "head_dim": 32,
        "sliding_window": 20,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    }
    | HALF_SLIDING,
    ("gemma3", "text of a multimodal model"): {
        "head_dim": 32,
        "sliding_window": 20,
        "query_pre_attn_scalar": 24,
    }
    | HALF_SLIDING,
    ("gpt_oss", "windows"): GPT_OSS,
    ("gpt_oss", "yarn, clamped"): GPT_OSS
    | {
        "rope_parameters": YARN | {"truncate": False},
        "swiglu_limit": 0.4 if READS_CLAMP else 7.0,
        "swiglu_alpha": 1.3 if READS_CLAMP else 1.702,
    },
    ("gpt_oss", "no bias, full"): GPT_OSS
    | {"attention_bias": False, "layer_types": ["full_attention"] * 3},
    ("stablelm", "pre"): {},
    ("stablelm", "parallel, bias"): {"use_parallel_residual": True, "use_qkv_bias": True},
    ("stablelm", "qk norms"): {"qk_layernorm": True},
    ("stablelm", "parallel, qk norms"): {"use_parallel_residual": True, "qk_layernorm": True},
    ("starcoder2", "full"): {},
    ("starcoder2", "window"): {"sliding_window": 20, "use_bias": False},
    ("cohere", "plain"): {"pad_token_id": 0},
    ("cohere", "qk_norm"): {"pad_token_id": 0, "use_qk_norm": True, "logit_scale": 0.3},
    ("phi", "mha"): {"num_key_value_heads": 4},
    ("phi", "gqa"): {},
    ("phi", "qk norms"): {"qk_layernorm": True},
    ("gpt_neox", "parallel"): {},
    ("gpt_neox", "one behind the other"): {"use_parallel_residual": False},
    ("gpt_neox", "no bias"): {"attention_bias": False},
    ("opt", "plain"): {"ffn_dim": 112, "word_embed_proj_dim": 64, "pad_token_id": 1},
    ("opt", "no bias"): {
        "ffn_dim": 112,
        "word_embed_proj_dim": 64,
        "pad_token_id": 1,
        "enable_bias": False,
    },
    ("opt", "350m"): {
        "ffn_dim": 112,
        "word_embed_proj_dim": 40,
        "pad_token_id": 1,
        "do_layer_norm_before": False,
        "tie_word_embeddings": True,
    },
    ("opt", "no final norm"): {
        "ffn_dim": 112,
        "word_embed_proj_dim": 64,
        "pad_token_id": 1,
        "_remove_final_layer_norm": True,
    },
    ("gpt2", "plain"): {"n_positions": 512},
    ("gpt2", "n_inner"): {"n_positions": 512, "n_inner": 80},
    ("falcon", "7b"): {"ffn_hidden_size": 112},
    ("falcon", "bias"): {"ffn_hidden_size": 112, "bias": True},
}
BLOCK_SIZE = 16
NUM_TOKENS = 150


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


@torch.inference_mode()
def logits_in_chunks(model: Decoder, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every token, fed in chunks of these sizes through scattered KV blocks."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    block_table = torch.randperm(num_blocks, dtype=torch.int32)[None] + 1
    sizes = num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu")
    caches = allocate_kv_caches(model.spec, whole_contexts(model.spec), *sizes)
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
        outputs.append(model.compute_logits(model(ids, positions, caches, [attn] * len(caches))))
        start += size
    return torch.cat(outputs)


@torch.inference_mode()
def logits_of_ends(model: Decoder, token_ids: list[int], indices: list[int]) -> torch.Tensor:
    """Logits of some tokens of a prompt that is fed at once."""
    num_tokens, num_blocks = len(token_ids), -(-len(token_ids) // BLOCK_SIZE)
    sizes = num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu")
    caches = allocate_kv_caches(model.spec, whole_contexts(model.spec), *sizes)
    positions, block_table = torch.arange(num_tokens), torch.arange(1, num_blocks + 1).int()[None]
    attn = AttentionMetadata(
        slot_mapping=positions + BLOCK_SIZE,
        block_tables=block_table,
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
    )
    at = torch.tensor(indices)
    rows = AttentionMetadata(
        slot_mapping=torch.full_like(at, -1),
        block_tables=block_table.repeat(len(indices), 1),
        seq_lens=(at + 1).int(),
        query_start_loc=torch.arange(len(indices) + 1).int(),
    )
    attn_of_layers = [attn] * len(caches)
    hidden = model(torch.tensor(token_ids), positions, caches, attn_of_layers, Ends(at, rows))
    return model.compute_logits(hidden)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_logits_equal_transformers(
    family: str, variant: str, tiny_model: Callable[..., Path]
) -> None:
    checkpoint = tiny_model(family, **VARIANTS[family, variant])
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    model = load(checkpoint)
    for chunks in ([NUM_TOKENS], [1] * NUM_TOKENS, [7, 1, 64, 1, 1, 33, 43]):
        actual = logits_in_chunks(model, token_ids, chunks)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    ends = [0, 70, NUM_TOKENS - 1]
    actual = logits_of_ends(model, token_ids, ends)
    torch.testing.assert_close(actual, expected[ends], atol=2e-4, rtol=1e-4)


def test_parameter_count_follows_from_the_spec(tiny_model: Callable[..., Path]) -> None:
    for (family, _), changes in VARIANTS.items():
        model = load(tiny_model(family, **changes))
        assert model.spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_info_tells_of_every_variant_without_its_weights(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for (family, variant), changes in VARIANTS.items():
        config = tiny_model(family, **changes) / "config.json"
        (tmp_path / "config.json").write_bytes(config.read_bytes())
        assert cli.main(["info", str(tmp_path), "--json"]) == 0, (family, variant)
        facts = json.loads(capsys.readouterr().out)
        assert facts["run_by"] == "compiledllm" and facts["layers"] == 3
        assert facts["parameters"] == load_spec(tmp_path).num_parameters
        assert facts["kv_bytes_per_token"] > 0 and facts["kv_tokens_that_fit"] > 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("falcon", {"alibi": True}, "alibi=True"),
    ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture=True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    ("stablelm", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_unknown_variant_refuses_to_load_and_names_the_field(
    family: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **changes)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=named):
        load_spec(tmp_path)
