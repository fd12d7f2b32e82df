"""Qwen3.5 and 3.6, dense and MoE: the text model; images are not supported."""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import qwen3, qwen_moe
from compiledllm.models.families.hf import activation_of
from compiledllm.models.families.qwen3_next import DELTA_NET, hybrid_spec, moe_spec
from compiledllm.models.families.wrapper import (
    TOWERS,
    experts_one_by_one,
    make_text_spec,
    wrapped,
)
from compiledllm.models.spec import MlpSpec, ModelSpec, MoeSpec

_TEXT = (
    qwen3.NAMES
    | qwen_moe.NAMES
    | DELTA_NET
    | {
        "model.layers.*.linear_attn.in_proj_qkv.*": "layers.*.attn.qkvzba.*:qkv",
        "model.layers.*.linear_attn.in_proj_z.*": "layers.*.attn.qkvzba.*:z",
        "model.layers.*.linear_attn.in_proj_b.*": "layers.*.attn.qkvzba.*:b",
        "model.layers.*.linear_attn.in_proj_a.*": "layers.*.attn.qkvzba.*:a",
    }
)
NAMES = wrapped(_TEXT)
IGNORED = ("mtp.**", *TOWERS)  # multi-token prediction, and images
unpack = experts_one_by_one


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen3_5Config, its MoE variant, or the config of a text model."""
    if hf.get_text_config() is not hf:
        architecture = hf.model_type.replace("qwen3_5", "Qwen3_5").replace("_moe", "Moe")
        return make_text_spec(hf, spec_from_hf, f"{architecture}ForConditionalGeneration")
    is_moe = hf.model_type == "qwen3_5_moe_text"
    mlp: MlpSpec | MoeSpec = (
        moe_spec(hf, renormalize=True)
        if is_moe
        else MlpSpec(hf.intermediate_size, activation=activation_of(hf))
    )
    architecture = "Qwen3_5MoeForCausalLM" if is_moe else "Qwen3_5ForCausalLM"
    mlps = [mlp] * hf.num_hidden_layers
    return hybrid_spec(hf, architecture, mlps, is_grouped=False)
