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
# Model type of the text model -> the function that reads its config, and the whole model's name.
_TEXTS = {
    "qwen2_5_vl_text": (qwen2.spec_from_hf, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl_text": (qwen3.spec_from_hf, "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe_text": (qwen_moe.spec_from_hf, "Qwen3VLMoeForConditionalGeneration"),
}


def unpack(
    tensors: Iterable[tuple[str, Content]], spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices one by one, as [outputs, inputs].

    Published checkpoints have one tensor [experts, inputs, outputs] for all experts. transformers
    also writes [experts, outputs, inputs].
    """
    return experts_one_by_one(_outputs_first(tensors, spec.hidden_size), spec)


def _outputs_first(
    tensors: Iterable[tuple[str, Content]], hidden_size: int
) -> Iterator[tuple[str, Content]]:
    """Transpose the experts' matrices if the checkpoint stores inputs first.

    A square matrix does not show its order, so it is held back until a matrix that is not square
    has shown the order.
    """
    is_turned: bool | None = None
    held: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        hidden_at = {"gate_up_proj": 1, "down_proj": 2}.get(name.rpartition(".experts.")[2])
        if hidden_at is None or not isinstance(tensor, Tensor) or tensor.dim() != 3:
            yield name, tensor
            continue
        held.append((name, tensor))
        if tensor.shape[1] != tensor.shape[2]:
            is_turned = tensor.shape[hidden_at] == hidden_size
        if is_turned is not None:
            yield from ((n, t.transpose(1, 2) if is_turned else t) for n, t in held)
            held.clear()


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers Qwen2_5_VLConfig, Qwen3VLConfig or Qwen3VLMoeConfig."""
    return make_text_spec(hf, *_TEXTS[hf.text_config.model_type])
