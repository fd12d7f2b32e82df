"""GLM-4.5, 4.6 and 4.7 with experts: sigmoid scores with a bias, groups, a shared expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from compiledllm.models.families import qwen_moe
from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec, RouterSpec

_SHARED = "model.layers.*.mlp.shared_experts"
_SCORE_BIAS = "model.layers.*.mlp.gate.e_score_correction_bias"  # before the pattern of `gate`
NAMES = {_SCORE_BIAS: "layers.*.mlp.score_bias"} | qwen_moe.NAMES
NAMES |= {
    f"{_SHARED}.gate_proj.*": "layers.*.mlp.shared.gate_up.*:gate",
    f"{_SHARED}.up_proj.*": "layers.*.mlp.shared.gate_up.*:up",
    f"{_SHARED}.down_proj.*": "layers.*.mlp.shared.down.*",
}


def unpack(
    tensors: Iterable[tuple[str, Content]], spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices one by one.

    The layer after the last one, which is for multi-token prediction, is left out.
    """
    extra_layer = re.compile(rf"(model\.)?(language_model\.)?layers\.{len(spec.layers)}\.")
    used = ((name, tensor) for name, tensor in tensors if not extra_layer.match(name))
    return qwen_moe.unpack(used, spec)


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Glm4MoeConfig or Glm4vMoeTextConfig."""
    expect(hf, "hidden_act", "silu")
    expect(hf, "scoring_func", None, "sigmoid")
    norm = NormSpec(hf.rms_norm_eps)
    attn = attention_of(
        hf,
        qkv_bias=hf.attention_bias,
        qk_norm=norm if getattr(hf, "use_qk_norm", False) else None,
    )
    dense = MlpSpec(hf.intermediate_size, activation=activation_of(hf))

    def layer(index: int) -> LayerSpec:
        is_dense = index < hf.first_k_dense_replace
        return LayerSpec(hf.hidden_size, attn, dense if is_dense else moe_spec(hf), norm)

    return model_spec(hf, "Glm4MoeForCausalLM", map(layer, range(hf.num_hidden_layers)), norm)


def moe_spec(hf: Any) -> MoeSpec:
    return MoeSpec(
        hf.moe_intermediate_size,
        hf.n_routed_experts,
        hf.num_experts_per_tok,
        RouterSpec(
            scores="sigmoid",
            renormalize=hf.norm_topk_prob,
            has_bias=True,
            num_groups=hf.n_group,
            top_groups=hf.topk_group,
            eps=1e-20,
            scale=hf.routed_scaling_factor,
            in_float32=True,
        ),
        shared_size=hf.moe_intermediate_size * hf.n_shared_experts,
        has_shared_gate=False,
    )
