"""GPT-NeoX and Pythia: parallel attention and ungated MLP, each with its own LayerNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compiledllm.models.families.hf import activation_of, attention_of, model_spec
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

NAMES = {
    "gpt_neox.embed_in.weight": "embedding",
    "gpt_neox.layers.*.input_layernorm.*": "layers.*.attn_norm.*",
    "gpt_neox.layers.*.attention.query_key_value.*": "layers.*.attn.qkv.*:q,k,v",
    "gpt_neox.layers.*.attention.dense.*": "layers.*.attn.out.*",
    "gpt_neox.layers.*.post_attention_layernorm.*": "layers.*.mlp_norm.*",
    "gpt_neox.layers.*.mlp.dense_h_to_4h.*": "layers.*.mlp.up.*",
    "gpt_neox.layers.*.mlp.dense_4h_to_h.*": "layers.*.mlp.down.*",
    "gpt_neox.final_layer_norm.*": "final_norm.*",
    "embed_out.*": "lm_head.*",
}


def prepare(name: str, tensor: Tensor, spec: ModelSpec) -> Tensor:
    """Reorder the fused projection, which is stored head by head, to all q, all k, all v."""
    if "query_key_value" not in name:
        return tensor
    by_head = tensor.view(spec.attentions[0].num_heads, 3, -1, *tensor.shape[1:])
    return by_head.transpose(0, 1).reshape(tensor.shape)


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GPTNeoXConfig."""
    norm = NormSpec(hf.layer_norm_eps, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(
            hf,
            num_kv_heads=hf.num_attention_heads,
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
        ),
        MlpSpec(hf.intermediate_size, True, activation_of(hf), gated=False),
        norm,
        residual="parallel_2" if hf.use_parallel_residual else "pre",
    )
    return model_spec(hf, "GPTNeoXForCausalLM", (layer,) * hf.num_hidden_layers, norm)
