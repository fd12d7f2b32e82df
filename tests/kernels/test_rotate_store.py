"""One fused kernel against the layers it replaces: norm, rope and store in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compiledllm.kernels.attention import kv_cache_shape, make_backend
from compiledllm.models.layers.attention import PagedAttention, can_fuse
from compiledllm.models.layers.factory import Factory
from compiledllm.models.layers.rope import RotaryTable
from compiledllm.models.spec import AttentionSpec, NormSpec, RopeSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm_kind", [None, "rms", "rms_plus_one"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "has_gate"),
    [
        *((4, 2, 64, 64, False), (3, 3, 80, 80, True), (8, 1, 128, 32, False)),
        *((7, 1, 16, 16, False), (5, 1, 32, 8, True)),
    ],
)
def test_fused_equals_layer_by_layer(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    has_gate: bool,
    norm_kind: str | None,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    norm = NormSpec(1e-6, norm_kind) if norm_kind else None
    rope = RopeSpec(tuple(0.9**n for n in range(rotary_dim // 2)))
    spec = AttentionSpec(
        num_heads, num_kv_heads, head_dim, 1.0, rope, qk_norm=norm, has_gate=has_gate
    )
    layer = PagedAttention(8, spec, make_backend("triton"), Factory()).to(DEVICE, dtype)
    for parameter in layer.parameters():
        parameter.normal_(1.0, 0.3)
    num_tokens = 5
    positions = torch.tensor([0, 7, 31, 500, 3], device=DEVICE)
    cos, sin = RotaryTable(rope).to(DEVICE)(positions, dtype)
    slots = torch.tensor([17, 40, -1, 63, 16], device=DEVICE)
    width = spec.q_rows + 2 * spec.kv_size
    qkv = torch.randn(num_tokens, width + 3, device=DEVICE).to(dtype)[:, :width]
    shape = kv_cache_shape(4, 16, num_kv_heads, head_dim)
    caches = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(3)]
    fused = layer._rotate_and_store(qkv, cos, sin, caches[0], slots, num_heads)
    only_stored = qkv[:, spec.q_rows :]
    layer._rotate_and_store(only_stored, cos, sin, caches[1], slots, num_heads=0)
    layer.backend = make_backend("torch")
    q = qkv[:, : spec.q_rows]
    if has_gate:
        q = q.view(num_tokens, num_heads, 2, head_dim)[:, :, 0].flatten(1)
    expected = layer._rotate(q, layer.q_norm, cos, sin)
    layer._rotate_then_store(only_stored, cos, sin, caches[2], slots)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(fused, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(caches[0], caches[1])
    torch.testing.assert_close(caches[0], caches[2], atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "keys_are_values", "qk_norm"),
    [(8, 2, 32, False, True), (5, 1, 512, True, True), (3, 3, 24, True, False)],
)
def test_normalised_values_and_keys_as_values(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    keys_are_values: bool,
    qk_norm: bool,
    dtype: torch.dtype,
) -> None:
    """Layers of Gemma 4, also those that read another layer's keys and values."""
    torch.manual_seed(0)
    half = head_dim // 2
    rope = RopeSpec((*(0.9**n for n in range(half // 4)), *[0.0] * (half - half // 4)))
    spec = AttentionSpec(
        *(num_heads, num_kv_heads, head_dim, 1.0, rope),
        qk_norm=NormSpec(1e-4) if qk_norm else None,
        v_norm=NormSpec(1e-4, "rms_unscaled"),
        keys_are_values=keys_are_values,
    )
    assert can_fuse(spec)
    layer = PagedAttention(8, spec, make_backend("triton"), Factory()).to(DEVICE, dtype)
    for parameter in layer.parameters():
        parameter.normal_(1.0, 0.3)
    cos, sin = RotaryTable(rope).to(DEVICE)(torch.tensor([0, 7, 500], device=DEVICE), dtype)
    slots = torch.tensor([17, -1, 63], device=DEVICE)
    qkv = (3 * torch.randn(3, sum(spec.qkv_parts.values()), device=DEVICE)).to(dtype)
    shape = kv_cache_shape(4, 16, num_kv_heads, head_dim)
    caches = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(4)]
    fused = layer._rotate_and_store(qkv, cos, sin, caches[0], slots, num_heads)
    kv = qkv[:, spec.q_rows :]
    layer._rotate_and_store(kv, cos, sin, caches[1], slots, num_heads=0)
    reader_spec = replace(spec, kv_layer=0, v_norm=None, keys_are_values=False)
    reader = PagedAttention(8, reader_spec, layer.backend, Factory()).to(DEVICE, dtype)
    if qk_norm:
        reader.q_norm.weight.copy_(layer.q_norm.weight)
    assert reader.is_fused
    q = qkv[:, : spec.q_rows]
    shared = reader._rotate_and_store(q.contiguous(), cos, sin, caches[3], slots, num_heads)
    layer.backend = make_backend("torch")
    expected = layer._rotate(q, layer.q_norm, cos, sin)
    layer._rotate_then_store(kv, cos, sin, caches[2], slots)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(fused, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(shared, fused)
    assert torch.equal(caches[0], caches[1]) and not caches[3].any()
    torch.testing.assert_close(caches[0], caches[2], atol=tolerance, rtol=tolerance)
