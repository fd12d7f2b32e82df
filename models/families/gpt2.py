"""GPT-2: learned positions, LayerNorm, an ungated MLP; matrices are stored transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec
from compiledllm.models.spec import (
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

_NAMES = {
    "wte.weight": "embedding",
    "wpe.weight": "positions",
    "h.*.ln_1.*": "layers.*.attn_norm.*",
    "h.*.attn.c_attn.*": "layers.*.attn.qkv.*:q,k,v",
    "h.*.attn.c_proj.*": "layers.*.attn.out.*",
    "h.*.ln_2.*": "layers.*.mlp_norm.*",
    "h.*.mlp.c_fc.*": "layers.*.mlp.up.*",
    "h.*.mlp.c_proj.*": "layers.*.mlp.down.*",
    "ln_f.*": "final_norm.*",
}
# Names in old checkpoints lack the prefix "transformer.".
NAMES = {f"transformer.{name}": target for name, target in _NAMES.items()} | _NAMES
NAMES["lm_head.*"] = "lm_head.*"


def prepare(name: str, tensor: Tensor, _spec: ModelSpec) -> Tensor:
    """Transpose the matrices, which are stored as [inputs, outputs]."""
    is_matrix = tensor.dim() == 2 and ".c_" in name
    return tensor.t() if is_matrix else tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GPT2Config."""
    expect(hf, "scale_attn_weights", True)
    expect(hf, "scale_attn_by_inverse_layer_idx", False)
    expect(hf, "add_cross_attention", False)
    norm = NormSpec(hf.layer_norm_epsilon, "layer", bias=True)
    layer = LayerSpec(
        hf.hidden_size,
        attention_of(
            hf,
            rope=RopeSpec(()),
            num_kv_heads=hf.num_attention_heads,
            qkv_bias=True,
            output_bias=True,
        ),
        MlpSpec(
            hf.n_inner or 4 * hf.hidden_size,
            True,
            activation_of(hf, "activation_function"),
            gated=False,
        ),
        norm,
    )
    return model_spec(
        hf,
        "GPT2LMHeadModel",
        (layer,) * hf.num_hidden_layers,
        norm,
        num_learned_positions=hf.max_position_embeddings,
    )
