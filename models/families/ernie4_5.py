"""ERNIE 4.5, dense and MoE: interleaved rotary embedding; a bias in the choice of experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiledllm.models.families import glm4_moe, qwen_moe
from compiledllm.models.families.hf import activation_of, attention_of, expect, model_spec, positive
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec, RouterSpec

_SCORE_BIAS = "moe_statics.e_score_correction_bias"
NAMES = glm4_moe.NAMES | {
    # The second name is that of transformers 5 in memory.
    f"model.layers.*.mlp.{prefix}{_SCORE_BIAS}": "layers.*.mlp.score_bias"
    for prefix in ("", "gate.")
}
IGNORED = ("mtp.**", "model.mtp_*.**")  # multi-token prediction


def unpack(
    tensors: Iterable[tuple[str, Content]], spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices one by one, and the biases that choose experts as [experts].

    The biases are stored as [1, experts].
    """
    for name, tensor in qwen_moe.unpack(tensors, spec):
        if name.endswith(_SCORE_BIAS) and isinstance(tensor, Tensor):
            tensor = tensor.flatten()
        yield name, tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Ernie4_5Config or Ernie4_5_MoeConfig."""
    expect(hf, "use_bias", False)
    is_moe = hf.model_type == "ernie4_5_moe"
    norm = NormSpec(hf.rms_norm_eps)
    attn = attention_of(hf)
    attn = replace(attn, rope=replace(attn.rope, interleaved=True))
    dense = MlpSpec(hf.intermediate_size, activation=activation_of(hf))

    def layer(index: int) -> LayerSpec:
        is_sparse = is_moe and _is_sparse(hf, index)
        return LayerSpec(hf.hidden_size, attn, _experts(hf) if is_sparse else dense, norm)

    architecture = "Ernie4_5_MoeForCausalLM" if is_moe else "Ernie4_5ForCausalLM"
    return model_spec(hf, architecture, map(layer, range(hf.num_hidden_layers)), norm)


def _is_sparse(hf: Any, index: int) -> bool:
    is_due = (index + 1) % positive(hf, "moe_layer_interval") == 0
    return bool(is_due and hf.moe_layer_start_index <= index <= hf.moe_layer_end_index)


def _experts(hf: Any) -> MoeSpec:
    expect(hf, "hidden_act", "silu")
    expect(hf, "moe_norm_min", 1e-12)  # a lower bound that no sum of weights reaches
    return MoeSpec(
        hf.moe_intermediate_size,
        hf.moe_num_experts,
        hf.moe_k,
        RouterSpec(has_bias=True, in_float32=True),
        shared_size=hf.moe_intermediate_size * hf.moe_num_shared_experts,
        has_shared_gate=False,
    )
