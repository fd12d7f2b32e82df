"""Conversion rules for the text model of Gemma 3.

llama.cpp stores RMSNorm weights plus one. Files may lack three facts that are part of
llama.cpp's code: every sixth layer has full attention, the other layers have a RoPE base of 10000,
and the 27B model derives its attention scale from hidden_size / heads instead of head_dim.
"""

from __future__ import annotations

from typing import Any

from compiledllm.models.gguf.file import GgufFile
from compiledllm.models.gguf.rules import (
    COMMON_KEYS,
    LLAMA_BLOCK,
    QK_NORMS,
    Rule,
    common_config,
    make_rules,
    shortest,
)

KEYS = (*COMMON_KEYS, "attention.sliding_window", "rope.freq_base_swa")
BLOCK = (
    LLAMA_BLOCK
    | QK_NORMS
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_FULL_EVERY = 6
_LAYERS_OF_27B = 62


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of a Gemma3ForCausalLM."""
    common = common_config(file, "gemma3")
    num_layers, heads = common["num_hidden_layers"], common["num_attention_heads"]
    is_27b = num_layers == _LAYERS_OF_27B
    kinds = ("sliding_attention", "full_attention")
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": common["hidden_size"] // heads if is_27b else common["head_dim"],
        "sliding_window": file.integer("gemma3.attention.sliding_window"),
        "layer_types": [kinds[index % _FULL_EVERY == 5] for index in range(num_layers)],
        "rope_parameters": _rope_parameters(file),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _rope_parameters(file: GgufFile) -> dict[str, dict[str, Any]]:
    kind = file.metadata.get("gemma3.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"RoPE scaling {kind!r} is not supported")
    full: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": shortest(file.number("gemma3.rope.freq_base", 1e6)),
    }
    if kind == "linear":
        factor = shortest(file.number("gemma3.rope.scaling.factor"))
        full |= {"rope_type": "linear", "factor": factor}
    sliding = shortest(file.number("gemma3.rope.freq_base_swa", 10000.0))
    return {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }


def rules(config: dict[str, Any]) -> dict[str, Rule]:
    return make_rules(config, BLOCK, norm_offset=-1.0)
