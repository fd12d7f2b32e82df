"""The gate of expert MLPs, for other kernels and as a kernel between two products."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options

_COLUMNS = 1024  # per program


@triton.jit
def gated(gate, up, alpha, limit, dtype, HAS_LIMIT: tl.constexpr, IS_GELU: tl.constexpr):
    """silu(gate) * up in float32, or the other forms of `moe.moe_experts`.

    gate, up: float32 with values of `dtype`. The result of silu is rounded to `dtype`, as in torch.
    """
    if IS_GELU:  # 0.5 * (1 + tanh(y)) is the sigmoid of 2 * y
        cubed = gate * gate * gate
        gate = gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * cubed)))
    elif HAS_LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1
        gate = gate / (1 + tl.exp(-alpha * gate))
    else:
        gate = gate / (1 + tl.exp(-gate))
    return gate.to(dtype).to(tl.float32) * up


@triton.jit
def _gate_kernel(
    both, out, size, alpha, limit, HAS_LIMIT: tl.constexpr, IS_GELU: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    gate = tl.load(both + row * 2 * size + column, inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + column, inside, other=0.0).to(tl.float32)
    result = gated(gate, up, alpha, limit, out.dtype.element_ty, HAS_LIMIT, IS_GELU)
    tl.store(out + row * size + column, result.to(out.dtype.element_ty), inside)


def gate(both: Tensor, alpha: float, limit: float, activation: str = "silu") -> Tensor:
    """silu(gate) * up, or the other forms of `moe.moe_experts`.

    both: [items, 2 * size], gate first, contiguous. Returns [items, size].
    """
    num_items, size = both.shape[0], both.shape[1] // 2
    out = both.new_empty((num_items, size))
    _gate_kernel[(num_items, triton.cdiv(size, _COLUMNS))](
        both, out, size, alpha, limit, HAS_LIMIT=limit != 0, IS_GELU=activation == "gelu_tanh",
        COLUMNS=_COLUMNS, **launch_options(),
    )  # fmt: skip
    return out
