"""Qwen3.5 and 3.6, dense and MoE: the text model; images are not supported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiledllm.models.families import qwen3, qwen_moe
from compiledllm.models.families.hf import activation_of, dtype_of, eos_token_ids
from compiledllm.models.families.qwen3_next import DELTA_NET, hybrid_spec, moe_spec
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import MlpSpec, ModelSpec, MoeSpec

_TEXT = (
    qwen3.NAMES
    | qwen_moe.NAMES
    | DELTA_NET
    | {
        "model.layers.*.linear_attn.in_proj_qkv.*": "layers.*.attn.qkvz.*:qkv",
        "model.layers.*.linear_attn.in_proj_z.*": "layers.*.attn.qkvz.*:z",
        "model.layers.*.linear_attn.in_proj_b.*": "layers.*.attn.ba.*:b",
        "model.layers.*.linear_attn.in_proj_a.*": "layers.*.attn.ba.*:a",
        # Names that `unpack` yields.
        "model.layers.*.mlp.experts.*.gate_up_proj": "layers.*.mlp.gate_up.*.weight:gate,up",
        "model.layers.*.mlp.experts.*.down_proj": "layers.*.mlp.down.*.weight",
    }
)
_MULTIMODAL = {f"model.language_model.{name[6:]}": target for name, target in _TEXT.items()}
NAMES = _MULTIMODAL | _TEXT
IGNORED = ("mtp.**", "model.visual.**", "visual.**")  # prediction of further tokens, images


def unpack(tensors: Iterable[tuple[str, Content]]) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices by themselves where a tensor holds those of all experts."""
    for name, tensor in tensors:
        prefix, _, matrix = name.partition(".mlp.experts.")
        if matrix in ("gate_up_proj", "down_proj") and isinstance(tensor, Tensor):
            for index, expert in enumerate(tensor):
                yield f"{prefix}.mlp.experts.{index}.{matrix}", expert
        else:
            yield name, tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen3_5Config, its MoE variant, or the config of a text model."""
    text = hf.get_text_config()
    is_moe = text.model_type == "qwen3_5_moe_text"
    mlp: MlpSpec | MoeSpec = (
        moe_spec(text, renormalize=True)
        if is_moe
        else MlpSpec(text.intermediate_size, activation=activation_of(text))
    )
    architecture = "Qwen3_5MoeForCausalLM" if is_moe else "Qwen3_5ForCausalLM"
    mlps = [mlp] * text.num_hidden_layers
    spec = hybrid_spec(text, architecture, mlps, is_grouped=False)
    if text is hf:
        return spec
    return replace(
        spec,
        architecture=architecture.replace("CausalLM", "ConditionalGeneration"),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        dtype=spec.dtype if hf.dtype is None else dtype_of(hf),
        eos_token_ids=eos_token_ids(hf) or spec.eos_token_ids,
    )
