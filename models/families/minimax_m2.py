"""MiniMax-M2: Mixtral with sigmoid scores and a bias, and an RMSNorm over all heads of q and k."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiledllm.models.families import llama, mixtral, qwen3
from compiledllm.models.families.hf import expect
from compiledllm.models.families.llama import with_attention
from compiledllm.models.spec import LayerSpec, ModelSpec, MoeSpec, RouterSpec

_MLPS = ("block_sparse_moe", "mlp")  # in checkpoints, and by transformers' modules
_SCORE_BIASES = (f"model.layers.*.{mlp}.e_score_correction_bias" for mlp in _MLPS)
NAMES = mixtral.NAMES | qwen3.NAMES | dict.fromkeys(_SCORE_BIASES, "layers.*.mlp.score_bias")
unpack = mixtral.unpack


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers MiniMaxM2Config."""
    expect(hf, "hidden_act", "silu")
    # Fields of published configs that transformers does not read.
    expect(hf, "scoring_func", None, "sigmoid")
    expect(hf, "use_routing_bias", None, True)
    expect(hf, "use_qk_norm", None, True)
    expect(hf, "qk_norm_type", None, "per_layer")
    expect(hf, "shared_intermediate_size", None, 0)
    # Checkpoints store the router in float32, so transformers computes its logits in float32.
    router = RouterSpec(scores="sigmoid", has_bias=True, in_float32=True)
    moe = MoeSpec(hf.intermediate_size, hf.num_local_experts, hf.num_experts_per_tok, router)

    def adapt(layer: LayerSpec, _index: int) -> LayerSpec:
        layer = with_attention(layer, qk_norm=layer.norm, qk_norm_over="whole")
        return replace(layer, mlp=moe)

    return llama.adapted(hf, "MiniMaxM2ForCausalLM", adapt)
