"""The text model of Qwen2.5-VL and Qwen3-VL, dense and MoE; images are not supported.

The three rotary sections of a token of text have the same position, which makes plain RoPE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from compiledllm.models.families import qwen2, qwen3, qwen_moe
from compiledllm.models.families.wrapper import (
    TOWERS,
    experts_one_by_one,
    make_text_spec,
    wrapped,
)
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import ModelSpec

NAMES = wrapped(qwen_moe.NAMES)
IGNORED = TOWERS
# Type of the text's config -> what reads it, and the name of the whole model.
_TEXTS = {
    "qwen2_5_vl_text": (qwen2.spec_from_hf, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl_text": (qwen3.spec_from_hf, "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe_text": (qwen_moe.spec_from_hf, "Qwen3VLMoeForConditionalGeneration"),
}


def unpack(
    tensors: Iterable[tuple[str, Content]], spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices by themselves, as [outputs, inputs].

    Published checkpoints hold all experts' in a tensor [experts, inputs, outputs]. transformers
    writes [experts, outputs, inputs] as well.
    """
    turned = ((name, _outputs_first(name, tensor, spec)) for name, tensor in tensors)
    return experts_one_by_one(turned, spec)


def _outputs_first(name: str, tensor: Content, spec: ModelSpec) -> Content:
    hidden_at = {"gate_up_proj": 1, "down_proj": 2}.get(name.rpartition(".experts.")[2])
    if hidden_at is None or not isinstance(tensor, Tensor) or tensor.dim() != 3:
        return tensor
    return tensor.transpose(1, 2) if tensor.shape[hidden_at] == spec.hidden_size else tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen2_5_VLConfig, Qwen3VLConfig or Qwen3VLMoeConfig."""
    return make_text_spec(hf, *_TEXTS[hf.text_config.model_type])
