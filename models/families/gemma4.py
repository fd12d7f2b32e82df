"""Gemma 4: the text model; KV of two shapes, KV that layers share, inputs per layer, experts.

Long because its layers differ in more ways than those of other families. Images and sound are not
supported. Layers with full attention have wider heads than layers with sliding windows, have fewer
KV heads if their keys are also their values, and rotate some of the dimensions only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from compiledllm.config import ConfigError
from compiledllm.models.families import gemma2
from compiledllm.models.families.hf import (
    activation_of,
    expect,
    model_spec,
    rope_from_hf,
    window_of,
)
from compiledllm.models.families.wrapper import (
    TOWERS,
    experts_one_by_one,
    make_text_spec,
    tensors_of,
    wrapped,
)
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
)

_LAYER, _MOE = "model.layers.*", "layers.*.experts.moe"
NAMES = wrapped(
    gemma2.NAMES
    | {
        "model.embed_tokens_per_layer.weight": "token_inputs.table",
        "model.per_layer_model_projection.*": "token_inputs.projection.*",
        "model.per_layer_projection_norm.weight": "token_inputs.norm.weight",
        f"{_LAYER}.per_layer_input_gate.*": "layers.*.token_input.gate.*",
        f"{_LAYER}.per_layer_projection.*": "layers.*.token_input.out.*",
        f"{_LAYER}.post_per_layer_input_norm.weight": "layers.*.token_input.norm.weight",
        f"{_LAYER}.layer_scalar": "layers.*.scalar",
        f"{_LAYER}.router.proj.*": f"{_MOE}.router.*",
        f"{_LAYER}.router.scale": "layers.*.experts.router_norm.weight",
        f"{_LAYER}.router.per_expert_scale": f"{_MOE}.expert_scales",
        f"{_LAYER}.post_feedforward_layernorm_1.weight": "layers.*.experts.dense_norm.weight",
        f"{_LAYER}.pre_feedforward_layernorm_2.weight": "layers.*.experts.norm.weight",
        f"{_LAYER}.post_feedforward_layernorm_2.weight": "layers.*.experts.out_norm.weight",
        f"{_LAYER}.experts.*.gate_proj.*": f"{_MOE}.gate_up.*.*:gate",
        f"{_LAYER}.experts.*.up_proj.*": f"{_MOE}.gate_up.*.*:up",
        f"{_LAYER}.experts.*.down_proj.*": f"{_MOE}.down.*.*",
        # The name that `unpack` yields.
        f"{_LAYER}.experts.*.gate_up_proj.*": f"{_MOE}.gate_up.*.*:gate,up",
    }
)
IGNORED = (*TOWERS, *tensors_of("embed_vision", "embed_audio", "vision_embedder"))
_UNUSED = re.compile(r".*\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\..*")


def unpack(
    tensors: Iterable[tuple[str, Content]], spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices one by one, and drop tensors that no layer uses.

    Published checkpoints contain projections of keys and values even for layers that read the KV of
    an earlier layer.
    """
    for name, tensor in experts_one_by_one(tensors, spec):
        match = _UNUSED.fullmatch(name)
        mixer = spec.layers[int(match[1])].mixer if match else None
        if not (isinstance(mixer, AttentionSpec) and mixer.kv_layer is not None):
            yield name, tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Gemma4Config, Gemma4UnifiedConfig, or their text configs."""
    name = "Gemma4Unified" if hf.model_type.startswith("gemma4_unified") else "Gemma4"
    if hf.get_text_config() is not hf:
        return make_text_spec(hf, spec_from_hf, f"{name}ForConditionalGeneration")
    expect(hf, "use_bidirectional_attention", None, "vision")
    norm = NormSpec(hf.rms_norm_eps)
    attentions = [_attention(hf, index, norm) for index in range(hf.num_hidden_layers)]
    mixers = with_shared_kv(hf, attentions)
    token_size = getattr(hf, "hidden_size_per_layer_input", None) or 0
    experts = _experts(hf) if getattr(hf, "enable_moe_block", False) else None

    def layer(index: int) -> LayerSpec:
        is_wide = hf.use_double_wide_mlp and mixers[index].kv_layer is not None
        size = hf.intermediate_size * (2 if is_wide else 1)
        return LayerSpec(
            hf.hidden_size,
            mixers[index],
            MlpSpec(size, activation=activation_of(hf, "hidden_activation")),
            norm,
            residual="sandwich",
            experts=experts,
            token_size=token_size,
            has_scalar=True,
        )

    return model_spec(
        hf,
        f"{name}ForCausalLM",
        map(layer, range(hf.num_hidden_layers)),
        norm,
        embedding_scale=hf.hidden_size**0.5,
        logit_soft_cap=hf.final_logit_softcapping or 0.0,
        token_vocab_size=hf.vocab_size_per_layer_input if token_size else 0,
    )


def with_shared_kv(hf: Any, attentions: list[AttentionSpec]) -> list[AttentionSpec]:
    """The layers' attention; the last layers read the KV of the last earlier layer of their type.

    Raises ConfigError if there is no such layer.
    """
    found = list(attentions)
    first_shared = hf.num_hidden_layers - (hf.num_kv_shared_layers or 0)
    for index, kind in enumerate(hf.layer_types[first_shared:], first_shared):
        same = [i for i in range(first_shared) if hf.layer_types[i] == kind]
        if not same:
            raise ConfigError(f"{hf.model_type}: no layer with {kind!r} stores keys and values")
        found[index] = replace(
            attentions[index], kv_layer=same[-1], v_norm=None, keys_are_values=False
        )
    return found


def _attention(hf: Any, index: int, norm: NormSpec) -> AttentionSpec:
    window, (head_dim, num_kv_heads) = window_of(hf, index), _heads(hf, index)
    return AttentionSpec(
        hf.num_attention_heads,
        num_kv_heads,
        head_dim,
        scale=1.0,
        rope=_rope(hf, head_dim, hf.layer_types[index]),
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        qk_norm=norm,
        sliding_window=window,
        v_norm=NormSpec(hf.rms_norm_eps, "rms_unscaled"),
        keys_are_values=bool(hf.attention_k_eq_v and not window),
    )


def _heads(hf: Any, index: int) -> tuple[int, int]:
    """The head size and the number of KV heads of a layer."""
    layer_configs = getattr(hf, "per_layer_config", None)
    if layer_configs is not None:
        return layer_configs[index].head_dim, layer_configs[index].num_key_value_heads
    # Older versions of transformers keep the fields as config.json has them.
    if window_of(hf, index):
        return hf.head_dim, hf.num_key_value_heads
    num_kv_heads = hf.num_global_key_value_heads if hf.attention_k_eq_v else None
    return hf.global_head_dim or hf.head_dim, num_kv_heads or hf.num_key_value_heads


def _rope(hf: Any, head_dim: int, kind: str) -> RopeSpec:
    """The rotation of a layer. In "proportional" RoPE, the slower pairs have frequency zero."""
    rope = hf.rope_parameters[kind]
    if rope.get("rope_type") != "proportional":
        return rope_from_hf(hf, head_dim, kind)
    num_rotated = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
    exponents = torch.arange(0, 2 * num_rotated, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** exponents) / rope.get("factor", 1.0)
    rest = head_dim // 2 - num_rotated
    return RopeSpec((*frequencies.tolist(), *[0.0] * rest))


def _experts(hf: Any) -> MoeSpec:
    expect(hf, "hidden_activation", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "silu")
    return MoeSpec(
        hf.moe_intermediate_size,
        hf.num_experts,
        hf.top_k_experts,
        RouterSpec(has_expert_scales=True),
        activation=activation_of(hf, "hidden_activation"),
    )
