"""`gated_norm.gated_rms_norm` in Triton."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options, with_packed_heads

_ELEMENTS = 1024  # elements per program, rounded to whole heads


@triton.jit(do_not_specialize=["num_heads"])
def _gated_norm_kernel(
    x, gate, weight, out, eps, x_stride, gate_stride, num_heads, DIM: tl.constexpr,
    PADDED: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some heads of a token."""
    if OVERLAP:
        gdc_launch_dependents()
    dtype = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, PADDED)
    scale = tl.load(weight + dim, dim < DIM, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    inside = (head < num_heads)[:, None] & (dim < DIM)[None, :]
    element = head[:, None] * DIM + dim[None, :]
    wide = tl.load(x + token * x_stride + element, inside, other=0.0).to(tl.float32)
    by = tl.load(gate + token * gate_stride + element, inside, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
    weighted = (scale[None, :] * normed.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    result = weighted * (by / (1 + tl.exp(-by)))
    tl.store(out + token * (num_heads * DIM) + element, result.to(dtype), inside)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gated_norm.gated_rms_norm`."""
    num_tokens, num_heads, dim = x.shape
    x, gate = map(with_packed_heads, (x, gate))
    out = x.new_empty(x.shape)
    if not num_tokens:
        return out
    padded = triton.next_power_of_2(dim)
    heads = min(max(_ELEMENTS // padded, 1), triton.next_power_of_2(num_heads))
    _gated_norm_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x, gate, weight, out, eps, x.stride(0), gate.stride(0), num_heads, DIM=dim, PADDED=padded,
        HEADS=heads, num_warps=4, **launch_options(),
    )  # fmt: skip
    return out
