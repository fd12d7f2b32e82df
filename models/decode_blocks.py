"""Describes a decoder's blocks to `kernels.decode_step`, or says why a model cannot use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from compiledllm.kernels.decode_step import DecodeLayer, DecodeMatrix, DecodeShape, layouts_of
from compiledllm.kernels.packed import Packed
from compiledllm.models.decoder import Decoder
from compiledllm.models.formats.packed import PackedFormat
from compiledllm.models.formats.plain import Plain
from compiledllm.models.layers.attention import PagedAttention, can_fuse
from compiledllm.models.layers.block import DecoderBlock
from compiledllm.models.layers.linear import Linear
from compiledllm.models.layers.mlp import GatedMlp
from compiledllm.models.layers.norm import RMSNorm
from compiledllm.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec

_NORMS = ("rms", "rms_plus_one")
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Fields of LayerSpec and AttentionSpec for features that a `DecodeShape` cannot describe. These
# fields must have their default values.
_FIELDS_OF_LAYERS = (
    *("residual_scale", "experts", "token_size", "has_scalar", "num_streams", "laurel_rank"),
    "num_ranks",
)
_FIELDS_OF_ATTENTION = (
    *("has_gate", "v_norm", "keys_are_values", "kv_layer", "in_chunks", "norms_rotated"),
    "qk_norm_over",
)


def why_not(spec: ModelSpec) -> str | None:
    """The reason why `DecodeShape` does not describe the model's blocks; None if it does."""
    if spec.implementation != "compiledllm":
        return f"{spec.implementation} runs the model"
    if spec.num_ranks > 1:
        return "several GPUs add up the outputs of each layer"
    for layer in spec.distinct_layers:
        if reason := _why_not_layer(layer):
            return reason
    if len({_without_window(layer) for layer in spec.distinct_layers}) > 1:
        return "its layers differ in more than their windows"
    return None


def _why_not_layer(layer: LayerSpec) -> str | None:
    attention, mlp = layer.mixer, layer.mlp
    if not isinstance(attention, AttentionSpec):
        return "some of its layers keep a state in place of keys and values"
    if not isinstance(mlp, MlpSpec) or not mlp.gated or mlp.sparsity:
        return "some of its MLPs are not dense and gated"
    if mlp.activation not in _ACTIVATIONS:
        return f"its MLPs' activation is {mlp.activation}"
    if layer.residual != "pre":
        return f"its norms lie as in '{layer.residual}', not before attention and MLP"
    for part, names in ((layer, _FIELDS_OF_LAYERS), (attention, _FIELDS_OF_ATTENTION)):
        if others := [name for name in names if not _is_default(part, name)]:
            return f"its layers have {', '.join(others)}"
    if not can_fuse(attention):
        return "it rotates or normalises queries and keys otherwise"
    norms = {norm.kind for norm in (layer.norm, attention.qk_norm) if norm is not None}
    if len(norms) > 1 or not norms.issubset(_NORMS):
        return f"its norms are of kind {', '.join(sorted(norms))}"
    return None


def _is_default(spec: LayerSpec | AttentionSpec, name: str) -> bool:
    default: object = type(spec).__dataclass_fields__[name].default
    return bool(getattr(spec, name) == default)


def _without_window(layer: LayerSpec) -> LayerSpec:
    attention = cast("AttentionSpec", layer.mixer)
    return replace(layer, mixer=replace(attention, sliding_window=0), formats=())


def describe(decoder: Decoder, block_size: int) -> tuple[DecodeShape, list[DecodeLayer]] | str:
    """The shape and tensors of a decoder's blocks, or the reason why they cannot be described.

    `why_not(decoder.spec)` must be None. block_size: tokens in a block of the KV cache.
    """
    blocks = cast("Sequence[DecoderBlock]", list(decoder.layers))
    layers = [layer for block in blocks if (layer := _layer(block)) is not None]
    layouts = layouts_of(layers)
    if len(layers) < len(blocks):
        return "some of its matrices are in a form that only separate kernels read"
    if layouts is None:
        return "its layers keep their matrices in different forms"
    spec = decoder.spec
    first = spec.layers[0]
    attention, mlp = cast("AttentionSpec", first.mixer), cast("MlpSpec", first.mlp)
    qk_norm = attention.qk_norm
    shape = DecodeShape(
        num_layers=len(layers),
        hidden_size=spec.hidden_size,
        intermediate_size=mlp.intermediate_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        rotary_dim=attention.rope.rotary_dim,
        block_size=block_size,
        eps=first.norm.eps,
        scale=attention.scale,
        dtype=spec.torch_dtype,
        kv_dtype=spec.torch_kv_dtype,
        layouts=layouts,
        qk_eps=0.0 if qk_norm is None else qk_norm.eps,
        plus_one=first.norm.kind == "rms_plus_one",
        activation=mlp.activation,
        soft_cap=attention.soft_cap,
        has_qk_norm=qk_norm is not None,
        has_qkv_bias=attention.qkv_bias,
        has_other_biases=attention.output_bias or mlp.bias,
        has_windows=any(layer.window for layer in layers),
        has_sinks=attention.has_sinks,
    )
    return shape, layers


def _layer(block: DecoderBlock) -> DecodeLayer | None:
    """A block's tensors; None if a `DecodeMatrix` cannot hold one of the block's matrices."""
    attention, mlp = block.attn, block.mlp
    assert isinstance(attention, PagedAttention) and isinstance(mlp, GatedMlp)
    linears = attention.qkv, attention.out, mlp.gate_up, mlp.down
    matrices = [matrix for linear in linears if (matrix := _matrix(linear)) is not None]
    if len(matrices) < len(linears):
        return None
    qkv, out, gate_up, down = matrices
    return DecodeLayer(
        attn_norm=_weight(block.attn_norm),
        qkv=qkv,
        out=out,
        mlp_norm=_weight(block.mlp_norm),
        gate_up=gate_up,
        down=down,
        kv_scales=attention.kv_scales,
        q_norm=None if attention.q_norm is None else _weight(attention.q_norm),
        k_norm=None if attention.k_norm is None else _weight(attention.k_norm),
        sinks=attention.sinks,
        window=attention.spec.sliding_window,
    )


def _weight(norm: nn.Module | None) -> nn.Parameter:
    assert isinstance(norm, RMSNorm)
    return norm.weight


def _matrix(linear: Linear) -> DecodeMatrix | None:
    format, params = linear.format, linear.params
    if isinstance(format, Plain):
        (weight,) = params
        assert weight is not None
        return DecodeMatrix(weight, linear.bias)
    if not isinstance(format, PackedFormat):
        return None
    codes, scales, zeros, permutation, row_scales = params
    assert codes is not None and row_scales is not None
    if permutation is not None:
        return None
    return DecodeMatrix(Packed(format.layout, codes, scales, zeros, row_scales), linear.bias)
