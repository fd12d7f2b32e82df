"""Gemma 3n: the text model; several residual streams, sparse gates, KV that layers share.

Images and sound are not supported. The per-layer token inputs and the shared KV are read as in the
later Gemma 4.
"""

from __future__ import annotations

from typing import Any

from compiledllm.models.families import gemma4
from compiledllm.models.families.hf import (
    activation_of,
    attention_of,
    expect,
    model_spec,
    rope_from_hf,
    window_of,
)
from compiledllm.models.families.wrapper import make_text_spec, wrapped
from compiledllm.models.spec import LayerSpec, MlpSpec, ModelSpec, NormSpec

_LAYER = "model.layers.*"
NAMES = gemma4.NAMES | wrapped(
    {
        "model.altup_projections.*.weight": "streams.split.*.weight",
        "model.altup_unembed_projections.*.weight": "streams.join.*.weight",
        f"{_LAYER}.altup.modality_router.*": "layers.*.altup.router.*",
        f"{_LAYER}.altup.router_norm.weight": "layers.*.altup.router_norm.weight",
        f"{_LAYER}.altup.prediction_coefs.weight": "layers.*.altup.prediction",
        f"{_LAYER}.altup.correction_coefs.weight": "layers.*.altup.correction",
        f"{_LAYER}.altup.correct_output_scale": "layers.*.altup.scale",
        f"{_LAYER}.laurel.linear_left.*": "layers.*.laurel.left.*",
        f"{_LAYER}.laurel.linear_right.*": "layers.*.laurel.right.*",
        f"{_LAYER}.laurel.post_laurel_norm.weight": "layers.*.laurel.norm.weight",
    }
)
IGNORED = gemma4.IGNORED
unpack = gemma4.unpack


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Gemma3nConfig or Gemma3nTextConfig."""
    if hf.get_text_config() is not hf:
        return make_text_spec(hf, spec_from_hf, "Gemma3nForConditionalGeneration")
    expect(hf, "altup_active_idx", 0)
    expect(hf, "altup_correct_scale", True)
    norm = NormSpec(hf.rms_norm_eps)

    def layer(index: int) -> LayerSpec:
        return LayerSpec(
            hf.hidden_size,
            mixers[index],
            MlpSpec(
                hf.intermediate_size[index],
                activation=activation_of(hf, "hidden_activation"),
                sparsity=hf.activation_sparsity_pattern[index],
            ),
            norm,
            residual="sandwich",
            token_size=hf.hidden_size_per_layer_input,
            num_streams=hf.altup_num_inputs,
            laurel_rank=hf.laurel_rank,
        )

    attentions = [
        attention_of(
            hf,
            hf.head_dim,
            rope_from_hf(hf, hf.head_dim, kind),
            scale=1.0,
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
            qk_norm=norm,
            v_norm=NormSpec(hf.rms_norm_eps, "rms_unscaled"),
            sliding_window=window_of(hf, index),
        )
        for index, kind in enumerate(hf.layer_types)
    ]
    mixers = gemma4.with_shared_kv(hf, attentions)
    return model_spec(
        hf,
        "Gemma3nForCausalLM",
        map(layer, range(hf.num_hidden_layers)),
        norm,
        embedding_scale=hf.hidden_size**0.5,
        logit_soft_cap=hf.final_logit_softcapping or 0.0,
        token_vocab_size=hf.vocab_size_per_layer_input,
    )
