"""gpt-oss: attention sinks, sliding windows on every second layer, clamped experts with biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from compiledllm.models.families import llama
from compiledllm.models.families.hf import attention_of, expect, model_spec, window_of
from compiledllm.models.mxfp4 import dequantize_mxfp4
from compiledllm.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec

_EXPERT = "model.layers.*.mlp.experts.*"
NAMES = llama.NAMES | {
    "model.layers.*.self_attn.sinks": "layers.*.attn.sinks",
    "model.layers.*.mlp.router.*": "layers.*.mlp.router.*",
    # Names that `unpack` yields.
    f"{_EXPERT}.gate_up_proj.*": "layers.*.mlp.gate_up.*.*:gate,up",
    f"{_EXPERT}.down_proj.*": "layers.*.mlp.down.*.*",
}
FORMATS = ("mxfp4",)


def unpack(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield each expert's matrices as [outputs, inputs], gate before up; other tensors unchanged.

    The checkpoint stores all experts in one tensor: [experts, inputs, outputs], or MXFP4 in
    `*_blocks` and `*_scales` of [experts, outputs, ...]. Rows of gate and up alternate in both.
    """
    halves: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        stem, _, kind = name.rpartition("_")
        if ".mlp.experts." not in name:
            yield name, tensor
        elif kind == "bias":
            yield from _one_by_one(name, tensor)
        elif kind not in ("blocks", "scales"):
            yield from _one_by_one(name, tensor.transpose(1, 2))
        elif (other := halves.pop(stem, None)) is None:
            halves[stem] = name, tensor
        else:
            pair = (tensor, other[1]) if kind == "blocks" else (other[1], tensor)
            experts = zip(*(part.to(device) for part in pair), strict=True)
            yield from _one_by_one(stem, (dequantize_mxfp4(b, s, dtype) for b, s in experts))
    yield from halves.values()  # blocks without scales, or the reverse: the loader reports the name


def _one_by_one(name: str, experts: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    prefix, matrix = name.removesuffix("_bias").rsplit(".", 1)
    leaf = "bias" if name.endswith("_bias") else "weight"
    for index, expert in enumerate(experts):
        if matrix.startswith("gate_up"):
            expert = torch.cat((expert[0::2], expert[1::2]))
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
        alpha=getattr(hf, "swiglu_alpha", 1.702),  # old versions of transformers hard-code both
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
