"""gpt-oss: attention sinks, sliding windows on every second layer, clamped experts with biases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from compiledllm.models.families import llama
from compiledllm.models.families.hf import attention_of, expect, model_spec, window_of
from compiledllm.models.formats.codes import QuantizedMatrix
from compiledllm.models.formats.slicing import Content, even_then_odd_rows, experts_of
from compiledllm.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec

_EXPERTS = "model.layers.*.mlp.experts"
NAMES = llama.NAMES | {
    "model.layers.*.self_attn.sinks": "layers.*.attn.sinks",
    "model.layers.*.mlp.router.*": "layers.*.mlp.router.*",
    **llama.names_of_experts(_EXPERTS),
    # As `unpack` yields it.
    f"{_EXPERTS}.*.gate_up_proj.*": "layers.*.mlp.gate_up.*.*:gate,up",
}


def unpack(
    tensors: Iterable[tuple[str, Content]], _spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices as [outputs, inputs], gate before up; other tensors unchanged.

    OpenAI's checkpoints store all experts in one tensor: [experts, inputs, outputs], or in MXFP4
    [experts, outputs, inputs]. `formats.stacked` has already taken stacks of other formats apart.
    In stacked tensors the rows of gate and up alternate; files with a tensor for each expert have
    separate tensors for gate and up.
    """
    for name, tensor in tensors:
        if _alternates(name):
            yield name, even_then_odd_rows(tensor)
        elif ".mlp.experts." not in name or _of_one_expert(name):
            yield name, tensor
        elif isinstance(tensor, QuantizedMatrix):
            yield from _one_by_one(name.removesuffix(".weight"), experts_of(tensor))
        else:
            is_bias = name.endswith("_bias")
            yield from _one_by_one(name, tensor if is_bias else tensor.transpose(1, 2))


_alternates = re.compile(r".*\.mlp\.experts\.\d+\.gate_up_proj\.\w+").fullmatch
_of_one_expert = re.compile(r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\.\w+").fullmatch


def _one_by_one(name: str, experts: Iterable[Content]) -> Iterator[tuple[str, Content]]:
    prefix, matrix = name.removesuffix("_bias").rsplit(".", 1)
    leaf = "bias" if name.endswith("_bias") else "weight"
    for index, expert in enumerate(experts):
        if matrix.startswith("gate_up"):
            expert = even_then_odd_rows(expert)
        yield f"{prefix}.{index}.{matrix}.{leaf}", expert


def spec_from_hf(hf: Any) -> ModelSpec:
    """ModelSpec of a transformers GptOssConfig."""
    expect(hf, "hidden_act", "silu")
    norm = NormSpec(hf.rms_norm_eps)
    moe = MoeSpec(
        hf.intermediate_size,
        hf.num_local_experts,
        hf.num_experts_per_tok,
        bias=True,
        # Older versions of transformers have these two numbers in code.
        alpha=getattr(hf, "swiglu_alpha", 1.702),
        limit=getattr(hf, "swiglu_limit", 7.0),
    )

    def layer(index: int) -> LayerSpec:
        attn = attention_of(
            hf,
            hf.head_dim,
            qkv_bias=hf.attention_bias,
            output_bias=hf.attention_bias,
            sliding_window=window_of(hf, index),
            has_sinks=True,
        )
        return LayerSpec(hf.hidden_size, attn, moe, norm)

    layers = map(layer, range(hf.num_hidden_layers))
    return model_spec(hf, "GptOssForCausalLM", layers, norm)
