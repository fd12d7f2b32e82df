"""The text model of Qwen2.5-VL and Qwen3-VL, dense and MoE; images are not supported.

The three rotary sections of a token of text have the same position, which makes plain RoPE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from compiledllm.models.families import qwen2, qwen3, qwen_moe
from compiledllm.models.families.wrapper import (
    EXPERTS_ONE_BY_ONE,
    TOWERS,
    experts_one_by_one,
    make_text_spec,
    wrapped,
)
from compiledllm.models.formats.slicing import Content, shape_of
from compiledllm.models.spec import ModelSpec

NAMES = wrapped(qwen_moe.NAMES | EXPERTS_ONE_BY_ONE)
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
    is_expert = re.compile(r".*\.mlp\.experts\.\d+\.(gate_up|down)_proj").fullmatch
    for name, tensor in experts_one_by_one(tensors, spec):
        hidden_at = 0 if name.endswith("gate_up_proj") else 1  # where the inputs come first
        is_transposed = is_expert(name) and shape_of(tensor)[hidden_at] == spec.hidden_size
        yield name, tensor.t() if is_transposed and isinstance(tensor, Tensor) else tensor


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen2_5_VLConfig, Qwen3VLConfig or Qwen3VLMoeConfig."""
    return make_text_spec(hf, *_TEXTS[hf.text_config.model_type])
