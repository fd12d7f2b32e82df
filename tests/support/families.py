"""Variants of every family at a tiny size, for tests of models, engines and the README."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def reads_clamp() -> bool:
    """Whether transformers reads gpt-oss's clamp from the config; older versions have constants.

    Looks into transformers' source, because importing it would add seconds to test collection.
    """
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    models = Path(spec.origin).with_name("models")
    return "swiglu_alpha" in (models / "gpt_oss" / "configuration_gpt_oss.py").read_text()


READS_CLAMP = reads_clamp()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
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
MINISTRAL3_ROPE = YARN | {
    "original_max_position_embeddings": 24,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

GLM_MROPE = MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
GLM4_MOE = {
    "head_dim": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 20,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {
        "sliding_attention": DEFAULT_ROPE,
        "full_attention": DEFAULT_ROPE
        | {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
GEMMA4_SHARED = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
GEMMA4_DENSE = {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
GEMMA3N = {
    "head_dim": 16,
    "sliding_window": 20,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "vocab_size_per_layer_input": 120,  # some tokens have no row
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "intermediate_size": [112, 112, 96, 112, 112, 112],
    "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0, 0.9, 0.0],
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
GPT_OSS = {
    "head_dim": 16,
    "sliding_window": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA4 = {
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 112,
    "num_local_experts": 6,
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 1, 0, 1],
    "attention_chunk_size": 24,  # no whole blocks of 16
    "floor_scale": 16,
    "attn_scale": 0.5,
    "rope_parameters": LLAMA3_ROPE,
}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
DELTA_NET = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
SHARED = {"shared_expert_intermediate_size": 40}
JOINED = {"shared_expert_intermediate_size": 48}  # as large as the other experts
LFM2 = {"norm_eps": 1e-5, "layer_types": ["conv", "full_attention", "conv"]}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "shared_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
EXPERTS_OF_GRANITE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
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
    ("ministral3", "queries that grow"): {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE}
    | HALF_SLIDING
    | {"sliding_window": 20},  # of all layers, as their types are not read
    ("mistral3", "text of a multimodal model"): {"model_type": "mistral", "head_dim": 32},
    ("mistral3", "ministral 3"): {"model_type": "ministral3", "head_dim": 16}
    | {"rope_parameters": MINISTRAL3_ROPE},
    ("qwen2_5_vl", "text of a multimodal model"): {"rope_parameters": MROPE},
    ("qwen3_vl", "text of a multimodal model"): {"head_dim": 16, "rope_parameters": MROPE}
    | {"sliding_window": 20},  # which is not read
    ("qwen3_vl_moe", "text of a multimodal model"): EXPERTS
    | {"head_dim": 16, "mlp_only_layers": [1], "rope_parameters": MROPE}
    | {"moe_intermediate_size": 32, "norm_topk_prob": False},  # a square matrix; renormalised
    ("olmo3", "windows, yarn"): {
        "head_dim": 24,
        "pad_token_id": 0,
        "sliding_window": 20,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT_ROPE},
    }
    | HALF_SLIDING,
    ("exaone4", "windows"): {"sliding_window": 20} | HALF_SLIDING,
    ("exaone4", "full"): {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ("glm", "partial rotary"): {"head_dim": 16, "pad_token_id": 0, "attention_bias": True},
    ("glm4", "partial rotary"): {"head_dim": 16, "pad_token_id": 0, "attention_bias": True},
    ("glm4_moe", "groups"): GLM4_MOE | {"n_group": 3, "topk_group": 2, "use_qk_norm": True},
    ("glm4_moe", "not renormalised, bias"): GLM4_MOE
    | {"norm_topk_prob": False, "attention_bias": True, "head_dim": 32},
    ("glm4v", "text of a multimodal model"): {"rope_parameters": GLM_MROPE},
    ("glm46v", "text of a multimodal model"): {"model_type": "glm4v_text"}
    | {"rope_parameters": GLM_MROPE, "attention_bias": False},  # which is not read
    ("glm4v_moe", "text of a multimodal model"): GLM4_MOE | {"rope_parameters": GLM_MROPE},
    ("minimax_m2", "experts"): {"head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 3}
    | {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}},
    ("ernie4_5", "tied"): {"head_dim": 32, "tie_word_embeddings": True},
    ("ernie4_5_moe", "some dense"): {
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_intermediate_size": 48,
    },
    ("hunyuan_v1_dense", "alpha"): {
        "head_dim": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1, "alpha": 50.0},
    },
    ("seed_oss", "biases"): {"head_dim": 32, "attention_out_bias": True},
    ("apertus", "xielu"): {"dtype": "float32", "rope_parameters": LLAMA3_ROPE},
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
    ("gemma3n_text", "e4b"): GEMMA3N,
    ("gemma3n_text", "two streams"): GEMMA3N
    | {"altup_num_inputs": 2, "num_kv_shared_layers": 0, "hidden_activation": "silu"},
    ("gemma4_text", "e4b"): GEMMA4 | GEMMA4_SHARED | {"hidden_size_per_layer_input": 16},
    ("gemma4_text", "31b"): GEMMA4 | GEMMA4_DENSE,
    ("gemma4_unified", "12b, text of a multimodal model"): GEMMA4 | GEMMA4_DENSE,
    ("gemma4", "26b, text of a multimodal model"): GEMMA4
    | GEMMA4_DENSE
    | {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 48},
    ("llama4_text", "scout"): LLAMA4 | {"attention_chunk_size": 32},
    ("llama4_text", "two experts, no temperatures or norms"): LLAMA4
    | {"num_experts_per_tok": 2, "attn_temperature_tuning": False, "use_qk_norm": False},
    ("llama4", "text of a multimodal model"): LLAMA4 | {"interleave_moe_layer_step": 2},
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
    ("starcoder2", "window"): {"sliding_window": 20, "use_bias": False, "head_dim": 24},
    ("cohere", "plain"): {"pad_token_id": 0},
    ("cohere", "qk_norm"): {"pad_token_id": 0, "use_qk_norm": True, "logit_scale": 0.3}
    | {"head_dim": 24},
    ("phi", "mha"): {"num_key_value_heads": 4, "hidden_act": "swish"},
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
    ("qwen3_next", "experts"): DELTA_NET | EXPERTS | SHARED,
    ("qwen3_next", "some dense, attention last"): DELTA_NET
    | EXPERTS
    | SHARED
    | {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True}
    | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ("qwen3_5_text", "dense"): DELTA_NET | {"linear_num_key_heads": 4},
    ("qwen3_5", "text of a multimodal model"): DELTA_NET | {"linear_conv_kernel_dim": 3},
    ("qwen3_5_moe", "text of a multimodal model"): DELTA_NET | EXPERTS | JOINED,
    ("lfm2", "adjusted size"): LFM2 | {"head_dim": 24},
    ("lfm2", "bias, attention last"): LFM2
    | {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False}
    | {"layer_types": ["conv", "conv", "full_attention"], "tie_word_embeddings": True},
    ("lfm2_moe", "experts"): LFM2 | EXPERTS | {"num_dense_layers": 1},
    ("lfm2_moe", "no bias"): LFM2
    | EXPERTS
    | {"num_dense_layers": 2, "use_expert_bias": False, "norm_topk_prob": False}
    | {"routed_scaling_factor": 1.7},
    ("granitemoehybrid", "experts"): MAMBA2 | EXPERTS_OF_GRANITE,
    ("granitemoehybrid", "dense, groups, rope, biases"): MAMBA2
    | {"num_local_experts": 0, "mamba_n_groups": 2, "position_embedding_type": "rope"}
    | {"mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True}
    | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ("falcon", "7b"): {"ffn_hidden_size": 112},
    ("falcon", "bias"): {"ffn_hidden_size": 112, "bias": True},
}

# Family -> the variant that runs through a whole engine.
IN_ENGINE = {
    "apertus": "xielu",
    "cohere": "qk_norm",
    "ernie4_5_moe": "some dense",
    "exaone4": "windows",
    "falcon": "7b",
    "gemma": "mqa",
    "gemma2": "windows",
    "gemma3_text": "windows",
    "gemma3": "text of a multimodal model",
    "glm4": "partial rotary",
    "glm4_moe": "groups",
    "glm4v_moe": "text of a multimodal model",
    "gemma4": "26b, text of a multimodal model",
    "gemma3n_text": "e4b",
    "gemma4_text": "e4b",
    "gpt2": "plain",
    "gpt_neox": "parallel",
    "gpt_oss": "yarn, clamped",
    "granite": "multipliers",
    "granitemoehybrid": "experts",
    "hunyuan_v1_dense": "alpha",
    "lfm2": "bias, attention last",
    "lfm2_moe": "experts",
    "llama": "gqa",
    "llama4": "text of a multimodal model",
    "minimax_m2": "experts",
    "mistral": "window",
    "mistral3": "ministral 3",
    "mixtral": "experts",
    "qwen2_5_vl": "text of a multimodal model",
    "qwen3_vl_moe": "text of a multimodal model",
    "qwen3_moe": "renormalised",
    "qwen3_next": "experts",
    "qwen3_5": "text of a multimodal model",
    "qwen3_5_moe": "text of a multimodal model",
    "olmo3": "windows, yarn",
    "opt": "350m",
    "phi": "gqa",
    "phi3": "window, partial",
    "qwen2": "window",
    "qwen3": "gqa",
    "seed_oss": "biases",
    "smollm3": "nope",
    "stablelm": "qk norms",
    "starcoder2": "window",
}
