"""Granite 4 hybrid: Mamba-2 on most layers, attention without rotary embedding on the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.families import llama
from compiledllm.models.families.hf import expect, positive
from compiledllm.models.families.llama import with_attention
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, RopeSpec, RouterSpec
from compiledllm.models.state_specs import Mamba2Spec

# Names of the layer types, in transformers' configs and in the config.json of checkpoints.
_ATTENTION, _MAMBA = ("full_attention", "attention"), ("linear_attention", "mamba")

NAMES = llama.NAMES | {
    "model.layers.*.mamba.A_log": "layers.*.attn.log_decay_rate",
    "model.layers.*.mamba.dt_bias": "layers.*.attn.step_bias",
    "model.layers.*.mamba.D": "layers.*.attn.skip",
    "model.layers.*.mamba.conv1d.weight": "layers.*.attn.convolution",
    "model.layers.*.mamba.conv1d.bias": "layers.*.attn.convolution_bias",
    "model.layers.*.mamba.norm.weight": "layers.*.attn.norm",
    "model.layers.*.mamba.in_proj.*": "layers.*.attn.zxbcdt.*:zxbc,dt",
    "model.layers.*.mamba.out_proj.*": "layers.*.attn.out.*",
    "model.layers.*.block_sparse_moe.router.layer.*": "layers.*.mlp.router.*",
    "model.layers.*.block_sparse_moe.router.*": "layers.*.mlp.router.*",
    "model.layers.*.shared_mlp.input_linear.*": "layers.*.mlp.gate_up.*:gate,up",
    "model.layers.*.shared_mlp.output_linear.*": "layers.*.mlp.down.*",
}
# In models with experts, the MLP that others have alone is a shared expert.
_NAMES_WITH_EXPERTS = NAMES | {
    "model.layers.*.shared_mlp.input_linear.*": "layers.*.mlp.shared.gate_up.*:gate,up",
    "model.layers.*.shared_mlp.output_linear.*": "layers.*.mlp.shared.down.*",
    **llama.names_of_experts("model.layers.*.block_sparse_moe.experts"),
    # As `unpack` yields them.
    "model.layers.*.expert.*.input_linear.*": "layers.*.mlp.gate_up.*.*:gate,up",
    "model.layers.*.expert.*.output_linear.*": "layers.*.mlp.down.*.*",
}

_IN_MEMORY = {  # names of experts in transformers 5's modules -> those in published files
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
}


def names(spec: ModelSpec) -> dict[str, str]:
    return _NAMES_WITH_EXPERTS if isinstance(spec.layers[0].mlp, MoeSpec) else NAMES


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GraniteMoeHybridConfig."""
    expect(hf, "hidden_act", "silu")
    expect(hf, "position_embedding_type", None, "nope", "rope")
    expect(hf, "normalization_function", None, "rmsnorm")
    if tuple(hf.time_step_limit) != (0.0, math.inf):
        raise ConfigError(f"{hf.model_type}: time_step_limit={hf.time_step_limit} is not supported")
    if unknown := {*hf.layer_types} - {*_ATTENTION, *_MAMBA}:
        raise ConfigError(f"{hf.model_type}: layer_types has {min(unknown)!r}: not supported")
    mamba = Mamba2Spec(
        hf.mamba_n_heads,
        hf.mamba_d_head,
        hf.mamba_n_groups,
        hf.mamba_d_state,
        hf.mamba_d_conv,
        hf.rms_norm_eps,
        hf.mamba_conv_bias,
        hf.mamba_proj_bias,
    )
    mlp: MlpSpec | MoeSpec = MlpSpec(hf.shared_intermediate_size)
    if hf.num_local_experts:
        size, top_k = hf.intermediate_size, hf.num_experts_per_tok
        shared = {"shared_size": hf.shared_intermediate_size, "has_shared_gate": False}
        mlp = MoeSpec(size, hf.num_local_experts, top_k, RouterSpec(), **shared)

    def adapt(layer: LayerSpec, index: int) -> LayerSpec:
        layer = replace(layer, mlp=mlp, residual_scale=hf.residual_multiplier)
        if hf.layer_types[index] in _MAMBA:
            return replace(layer, mixer=mamba)
        return with_attention(layer, scale=hf.attention_multiplier)

    return llama.adapted(
        hf,
        "GraniteMoeHybridForCausalLM",
        adapt,
        None if hf.position_embedding_type == "rope" else RopeSpec(()),
        embedding_scale=hf.embedding_multiplier,
        logit_scale=1 / positive(hf, "logits_scaling"),
    )


def unpack(
    tensors: Iterable[tuple[str, Content]], _spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield "X.expert.0.input_linear.weight" and so on for the stack of all experts."""
    for name, tensor in tensors:
        layer, _, matrix = name.rpartition(".block_sparse_moe.")
        matrix = _IN_MEMORY.get(matrix, matrix)
        if layer and matrix.endswith("_linear.weight") and isinstance(tensor, Tensor):
            for index, expert in enumerate(tensor):
                yield f"{layer}.expert.{index}.{matrix}", expert
        else:
            yield name, tensor
