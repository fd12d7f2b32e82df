"""Llama 4: the text model; attention in chunks, layers without positions, experts; no images.

In layers with rotary embedding, a token sees its chunk of the context only. In the other layers it
sees the whole context, and queries grow with the position (temperature tuning).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.families import qwen_moe
from compiledllm.models.families.hf import (
    activation_of,
    attention_of,
    expect,
    model_spec,
    of_layer,
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

_ROUTER = {"model.layers.*.feed_forward.router.*": "layers.*.mlp.router.*"}
NAMES = wrapped(
    _ROUTER | {name.replace(".mlp.", ".feed_forward."): to for name, to in qwen_moe.NAMES.items()}
)
IGNORED = (*TOWERS, *tensors_of("vision_model"))


def unpack(
    tensors: Iterable[tuple[str, Content]], spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrix [outputs, inputs] of tensors [experts, inputs, outputs]."""
    turned = (
        (
            name,
            tensor.transpose(1, 2) if isinstance(tensor, Tensor) and tensor.dim() == 3 else tensor,
        )
        for name, tensor in tensors
    )
    return experts_one_by_one(turned, spec)


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Llama4Config or Llama4TextConfig."""
    if hf.get_text_config() is not hf:
        spec = make_text_spec(hf, spec_from_hf, "Llama4ForConditionalGeneration")
        # The head belongs to the text model, whose config says whether it is tied.
        return replace(spec, tie_word_embeddings=bool(hf.text_config.tie_word_embeddings))
    expect(hf, "hidden_act", "silu")
    norm = NormSpec(hf.rms_norm_eps)
    dense = MlpSpec(hf.intermediate_size_mlp, activation=activation_of(hf))
    experts = MoeSpec(
        hf.intermediate_size,
        hf.num_local_experts,
        hf.num_experts_per_tok,
        RouterSpec(scores="sigmoid", renormalize=False),
        shared_size=hf.intermediate_size,
        has_shared_gate=False,
        scales_inputs=True,
    )

    def layer(index: int) -> LayerSpec:
        mlp = experts if index in hf.moe_layers else dense
        return LayerSpec(hf.hidden_size, _attention(hf, index), mlp, norm)

    return model_spec(hf, "Llama4ForCausalLM", map(layer, range(hf.num_hidden_layers)), norm)


def _attention(hf: Any, index: int) -> AttentionSpec:
    attention = attention_of(
        hf, hf.head_dim, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias
    )
    if hf.layer_types[index] not in ("full_attention", "chunked_attention"):
        raise ConfigError(f"llama4: layer_types has {hf.layer_types[index]!r}: not supported")
    if hf.layer_types[index] == "chunked_attention" and hf.attention_chunk_size:
        attention = replace(attention, sliding_window=hf.attention_chunk_size, in_chunks=True)
    if not of_layer(hf, "no_rope_layers", index):  # despite its name, 1 for layers with rotation
        return replace(attention, rope=_unrotated(hf))
    norm = NormSpec(hf.rms_norm_eps, "rms_unscaled") if hf.use_qk_norm else None
    rope = replace(attention.rope, interleaved=True)
    return replace(attention, rope=rope, qk_norm=norm, norms_rotated=True)


def _unrotated(hf: Any) -> RopeSpec:
    """The RopeSpec of layers without rotation, whose queries may grow with the position."""
    if not hf.attn_temperature_tuning:
        return RopeSpec(())
    growth = float(hf.attn_scale), int(hf.floor_scale)
    return RopeSpec((0.0,) * (hf.head_dim // 2), growth=growth, first_position=1)
