"""Random decoder blocks as `kernels.decode_step` describes them, and steps of rows through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compiledllm.kernels import decode_step_torch
from compiledllm.kernels.backend import FP8, AttentionMetadata, make_row_bound
from compiledllm.kernels.decode_step import DecodeLayer, DecodeMatrix, DecodeShape, DecodeStep
from compiledllm.kernels.packed import Packed, pack

TINY = DecodeShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rotary_dim=32,
    block_size=16,
    eps=1e-5,
    scale=0.2,
    dtype=torch.bfloat16,
    kv_dtype=torch.bfloat16,
    layouts=(None, None, None, None),
)


@dataclass
class StepInputs:
    x: Tensor
    cos: Tensor
    sin: Tensor
    attn: AttentionMetadata


def make_layers(
    shape: DecodeShape, device: str, windows: Sequence[int]
) -> tuple[list[DecodeLayer], list[DecodeLayer]]:
    """The layers, and the same layers in float32 with unquantised weights."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(shape.dtype)

    def matrix(outputs: int, inputs: int, has_bias: bool) -> tuple[DecodeMatrix, DecodeMatrix]:
        weight, exact = make_weight(shape, outputs, inputs, device)
        bias = randn(outputs) / 4 if has_bias else None
        exact_bias = None if bias is None else bias.float()
        return DecodeMatrix(weight, bias), DecodeMatrix(exact, exact_bias)

    def norm(size: int) -> Tensor:
        centre = 0 if shape.plus_one else 1
        return (centre + torch.randn(size, device=device) / 8).to(shape.dtype)

    hidden, other = shape.hidden_size, shape.has_other_biases
    sizes = {
        "qkv": (shape.qkv_size, hidden, shape.has_qkv_bias),
        "out": (hidden, shape.q_size, other),
        "gate_up": (2 * shape.intermediate_size, hidden, other),
        "down": (hidden, shape.intermediate_size, other),
    }
    layers, exact_layers = [], []
    for index in range(shape.num_layers):
        matrices = {name: matrix(*size) for name, size in sizes.items()}
        layer = DecodeLayer(
            attn_norm=norm(hidden),
            mlp_norm=norm(hidden),
            kv_scales=torch.tensor([0.5, 2.0], device=device),  # read with an FP8 cache only
            q_norm=norm(shape.head_dim) if shape.has_qk_norm else None,
            k_norm=norm(shape.head_dim) if shape.has_qk_norm else None,
            sinks=randn(shape.num_heads) if shape.has_sinks else None,
            window=windows[index % len(windows)] if windows else 0,
            **{name: pair[0] for name, pair in matrices.items()},
        )
        tensors = {
            name: value.float()
            for name in layer.__dataclass_fields__
            if isinstance(value := getattr(layer, name), Tensor)
        }
        layers.append(layer)
        exact = {name: pair[1] for name, pair in matrices.items()}
        exact_layers.append(replace(layer, **tensors, **exact))
    return layers, exact_layers


def make_weight(
    shape: DecodeShape, outputs: int, inputs: int, device: str
) -> tuple[Tensor | Packed, Tensor]:
    """A random matrix in the shape's layout, and the same matrix in float32."""
    layout, size = shape.layouts[0], 1 / inputs**0.5
    if layout is None:
        weight = (torch.randn(outputs, inputs, device=device) * size).to(shape.dtype)
        return weight, weight.float()
    groups = layout.groups * inputs // 128 or 1
    deviation = {"fp8": 1, "int8": 74, "int4": 4.6}[layout.code]
    block_rows = -(-outputs // layout.block_rows)
    scales = (torch.rand(block_rows, groups, device=device) + 0.5) * size / deviation
    scales = scales.to(getattr(torch, layout.scale_dtype))
    zeros = None
    if layout.code == "fp8":
        codes = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn)
        exact = codes.float()
    elif layout.code == "int8":
        codes = torch.randint(-128, 128, (outputs, inputs), device=device, dtype=torch.int8)
        exact = codes.float()
    else:
        assert layout.code == "int4", layout
        codes = torch.randint(0, 16, (outputs, inputs), device=device, dtype=torch.uint8)
        exact = codes.float() - 8
        if layout.has_zeros:
            zeros = torch.randint(0, 16, (outputs, groups), device=device, dtype=torch.uint8)
            exact = codes.float() - zeros.repeat_interleave(inputs // groups, 1)
    packed = pack(layout.code, codes, scales, zeros, inputs)
    assert packed is not None and packed.layout == layout, packed
    scales = scales.float().repeat_interleave(layout.block_rows, 0)[:outputs]
    return packed, exact * scales.repeat_interleave(inputs // groups, 1)


def make_caches(shape: DecodeShape, num_blocks: int, device: str) -> list[Tensor]:
    size = 2, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim
    return [torch.randn(size, device=device).to(shape.kv_dtype) for _ in range(shape.num_layers)]


def make_inputs(
    shape: DecodeShape, lengths: Sequence[int], num_blocks: int, device: str
) -> StepInputs:
    """A step of rows with these lengths; 0: a padding row."""
    num_rows = len(lengths)
    x = torch.randn(num_rows, shape.hidden_size, device=device).to(shape.dtype)
    angles = torch.rand(num_rows, 1, shape.rotary_dim // 2, device=device) * 6
    angles = torch.cat((angles, angles), -1)
    counts = [-(-length // shape.block_size) for length in lengths]
    pages = (torch.randperm(num_blocks - 1, device=device)[: sum(counts)] + 1).int().split(counts)
    tables = torch.zeros(num_rows + 1, max(counts) + 2, dtype=torch.int32, device=device)
    slots = torch.full((num_rows,), -1, device=device)
    for row, (length, own) in enumerate(zip(lengths, pages, strict=True)):
        tables[row, : len(own)] = own
        if length:
            slots[row] = own[-1] * shape.block_size + (length - 1) % shape.block_size
    seq_lens = torch.tensor([*lengths, 0], dtype=torch.int32, device=device)
    has_token = torch.tensor([length > 0 for length in lengths], device=device)
    starts = torch.cat((has_token.new_zeros(1), has_token.cumsum(0), has_token.sum()[None])).int()
    attn = AttentionMetadata(slots, tables, seq_lens, starts, make_row_bound(1))
    return StepInputs(x, angles.cos().to(shape.dtype), angles.sin().to(shape.dtype), attn)


@dataclass
class Case:
    """A step with its layers in float32."""

    step: DecodeStep
    exact: list[DecodeLayer]


def make_case(
    shape: DecodeShape, kernel: Any, num_blocks: int, device: str, windows: Sequence[int] = ()
) -> Case:
    layers, exact = make_layers(shape, device, windows)
    step = DecodeStep(shape, layers, kernel)
    step.bind(make_caches(shape, num_blocks, device))
    return Case(step, exact)


def expected(case: Case, inputs: StepInputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What the reference returns, in float32, with the caches that it leaves; FP8 stays FP8."""
    shape = replace(case.step.shape, dtype=torch.float32, kv_dtype=torch.float32)
    is_fp8 = case.step.shape.kv_dtype == FP8
    caches = [cache.clone() if is_fp8 else cache.float() for cache in case.step.kv_caches]
    x, update = inputs.x.float(), torch.zeros_like(inputs.x, dtype=torch.float32)
    tables = inputs.cos.float(), inputs.sin.float()
    for layer, cache in zip(case.exact, caches, strict=True):
        x, update = decode_step_torch.run_block(
            shape, layer, x, update, *tables, cache, inputs.attn
        )
    return x, update, caches


def assert_equals_reference(case: Case, inputs: StepInputs) -> None:
    """Run a step; compare the result of rows with a token, and the caches, with the reference."""
    x, update, caches = expected(case, inputs)
    found = case.step(inputs.x, inputs.cos, inputs.sin, inputs.attn)
    rows = inputs.attn.slot_mapping >= 0
    # The reference rounds other numbers, in an FP8 cache some of them to neighbouring codes.
    is_fp8 = case.step.shape.kv_dtype == FP8
    bound = 0.06 if is_fp8 else 0.02 if case.step.shape.dtype == torch.bfloat16 else 0.004
    for is_, ought in zip(found, (x, update), strict=True):
        difference = is_[rows].float() - ought[rows]
        assert difference.norm() < bound * ought[rows].norm()
        assert difference.abs().max() < 4 * bound * ought[rows].abs().max()
    bound = 2**-3 if is_fp8 else bound
    for is_, ought in zip(case.step.kv_caches, caches, strict=True):
        torch.testing.assert_close(is_.float(), ought.float(), atol=5 * bound, rtol=bound)
