"""The gated delta rule in Triton: the launcher, and the kernel for rows with one token.

The kernel takes one step of the recurrence. A step is memory-bound: a program reads and writes some
columns of one head's state once and computes in float32. `chunked_delta_rule_triton` computes rows
with several tokens. Grids follow from shapes alone and the host reads nothing back, so a captured
call serves rows of any length.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.backend import max_row_tokens
from compiledllm.kernels.chunked_delta_rule_triton import (
    ChunkTiling,
    ScanTiling,
    activated_gates,
    compute_chunks,
)
from compiledllm.kernels.delta_rule import EPS, why_not_on_gpu
from compiledllm.kernels.launch import launch_options, with_packed_heads


@dataclass(frozen=True, slots=True)
class StepTiling:
    """The tile of a program of `_step_kernel`.

    columns: number of columns of the state, which are value dimensions.
    """

    columns: int
    num_warps: int


def step_tiling(value_dim: int, state_dtype: torch.dtype, num_programs: int) -> StepTiling:
    """The fastest of 8 to 20 tilings on an H200 (32 value heads of 128; 1, 4, 8 and 64 rows).

    num_programs: rows times value heads.
    """
    if num_programs <= 128 and state_dtype.itemsize == 4:
        return StepTiling(min(16, value_dim), 1)
    return StepTiling(min(32, value_dim), 2 if state_dtype.itemsize == 4 else 1)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _step_kernel(
    query, key, value, a, b, log_decay_rate, step_bias, state, rows, query_start_loc, seq_lens,
    out, query_stride, key_stride, value_stride, state_stride, a_stride, b_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    EPS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of one head of a row with one token. GROUP: value heads for each key head."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1)
    token, end = tl.load(query_start_loc + row).to(tl.int64), tl.load(query_start_loc + row + 1)
    slot, length = tl.load(rows + row).to(tl.int64), tl.load(seq_lens + row)
    if end != token + 1:  # after the loads, which are in flight together
        return
    TILES: tl.constexpr = VALUE_DIM // COLUMNS
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    dim = tl.arange(0, KEY_DIM)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    own = state + slot * state_stride + head * KEY_DIM * VALUE_DIM
    own = own + dim[:, None] * VALUE_DIM + column[None, :]
    s = tl.load(own, length > 1, other=0.0).to(tl.float32)
    key_dims = head // GROUP * KEY_DIM + dim
    q = tl.load(query + token * query_stride + key_dims).to(tl.float32)
    k = tl.load(key + token * key_stride + key_dims).to(tl.float32)
    v = tl.load(value + token * value_stride + head * VALUE_DIM + column).to(tl.float32)
    log_decay, beta = activated_gates(
        tl.load(a + token * a_stride + head), tl.load(b + token * b_stride + head),
        tl.load(log_decay_rate + head), tl.load(step_bias + head),
    )  # fmt: skip
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * KEY_DIM**-0.5
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    # The output is query^T S + (query^T key) update, which needs no second pass over the new state.
    s *= tl.exp(log_decay)
    update = beta * (v - tl.sum(s * k[:, None], 0))
    result = tl.sum(s * q[:, None], 0) + tl.sum(q * k, 0) * update
    tl.store(own, (s + k[:, None] * update[None, :]).to(state.dtype.element_ty))
    target = out + (token * NUM_HEADS + head) * VALUE_DIM + column
    tl.store(target, result.to(out.dtype.element_ty))


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay_rate: Tensor,
    step_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    row_bound: Tensor | None = None,
    snapshots: Tensor | None = None,
    step: StepTiling | None = None,
    chunk: ChunkTiling | None = None,
    scan: ScanTiling | None = None,
) -> Tensor:
    """See `delta_rule.gated_delta_rule`. step, chunk, scan: None chooses the usual tiling."""
    num_tokens, num_heads, value_dim = value.shape
    out = value.new_empty(value.shape)
    if not num_tokens:
        return out
    num_key_heads, key_dim = key.shape[1:]
    assert why_not_on_gpu(key_dim, value_dim) is None, (key_dim, value_dim)
    assert num_heads % num_key_heads == 0 and state[0].is_contiguous()
    assert log_decay_rate.dtype == step_bias.dtype == torch.float32
    query, key, value = map(with_packed_heads, (query, key, value))
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    gates = a, b, log_decay_rate, step_bias
    tensors = query, key, value, *gates, state, rows, query_start_loc, seq_lens, out
    strides = tuple(x.stride(0) for x in (query, key, value, state, a, b))
    constants = {
        "NUM_HEADS": num_heads, "GROUP": num_heads // num_key_heads, "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim, "EPS": EPS, **launch_options(),
    }  # fmt: skip
    t = step or step_tiling(value_dim, state.dtype, num_heads * len(rows))
    _step_kernel[(num_heads * (value_dim // t.columns), len(rows))](
        *tensors, *strides, COLUMNS=t.columns, num_warps=t.num_warps, **constants
    )
    if row_bound is None or max_row_tokens(row_bound) != 1:
        compute_chunks(tensors, strides, constants, snapshots, chunk, scan)
    return out
