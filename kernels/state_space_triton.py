"""The state space of Mamba-2 in Triton: one kernel for rows with one token, one for other rows.

A program of either kernel holds some columns of one head's state in float32 registers.
`_scan_kernel` goes through a row in chunks of 64 tokens:

    out = since * (c @ S) + scores @ u,  u = step * x
    S   = S * decay + (until * b)^T @ u

since and until, [tokens, 1], are the decays from the start of the chunk to each token and from the
token to the end of the chunk. scores (lower triangular) has the products of c with b, times the
decay between the two tokens. The border of a snapshot (see `short_convolution`) ends a chunk.
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
from compiledllm.kernels.chunked_delta_rule_triton import product, step_size
from compiledllm.kernels.launch import launch_options, with_packed_heads
from compiledllm.kernels.state_space import why_not_on_gpu

# Slices of packed inputs, which begin at any address: Triton must not specialise on alignment.
_SLICES = ["rows", "snapshots"]


@dataclass(frozen=True, slots=True)
class StateTiling:
    """The tile of a program of either kernel.

    columns: number of columns of the state, which are head dimensions.
    """

    columns: int
    num_warps: int
    num_stages: int = 1


def step_tiling(head_dim: int) -> StateTiling:
    return StateTiling(min(32, head_dim), 2)


def scan_tiling(dtype: torch.dtype, state_dim: int, head_dim: int) -> StateTiling:
    """The tiling of the scan.

    Compiled for compute capability 9.0, 64 columns of a state of 128 rows take all 255 registers
    of a thread with eight warps; four warps would spill. Rows of less than 128 bytes are computed
    by two warps, for which Triton uses no `wgmma`: with rows of 64 bytes and eight warps, Triton
    3.6 reads past the shared memory.
    """
    columns = min(64 if dtype.itemsize == 2 else 32, head_dim)
    if min(columns, state_dim) * dtype.itemsize < 128:
        return StateTiling(columns, 2)
    return StateTiling(columns, 8, 2 if dtype.itemsize == 2 else 1)


@triton.jit(do_not_specialize_on_alignment=_SLICES)
def _step_kernel(
    x, b, c, step, log_decay_rate, step_bias, skip, state, rows, query_start_loc, seq_lens, out,
    x_stride, key_stride, query_stride, step_stride, state_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, STATE_DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of one head of a row with one token. GROUP: heads for each group of b and c."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1)
    token, end = tl.load(query_start_loc + row).to(tl.int64), tl.load(query_start_loc + row + 1)
    slot, length = tl.load(rows + row).to(tl.int64), tl.load(seq_lens + row)
    if end != token + 1:  # after the loads, which are in flight together
        return
    TILES: tl.constexpr = HEAD_DIM // COLUMNS
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    dim = tl.arange(0, STATE_DIM)
    column = head * HEAD_DIM + tile * COLUMNS + tl.arange(0, COLUMNS)
    place = head * STATE_DIM * HEAD_DIM + dim[:, None] * HEAD_DIM + (column - head * HEAD_DIM)
    own = state + slot * state_stride + place
    s = tl.load(own, length > 1, other=0.0).to(tl.float32)
    group_dims = head // GROUP * STATE_DIM + dim
    key = tl.load(b + token * key_stride + group_dims).to(tl.float32)
    query = tl.load(c + token * query_stride + group_dims).to(tl.float32)
    value = tl.load(x + token * x_stride + column).to(tl.float32)
    size = step_size(tl.load(step + token * step_stride + head), tl.load(step_bias + head))
    decay = tl.exp(-tl.exp(tl.load(log_decay_rate + head)) * size)
    s = s * decay + key[:, None] * (value * size)[None, :]
    result = tl.sum(s * query[:, None], 0) + tl.load(skip + head) * value
    tl.store(own, s.to(state.dtype.element_ty))
    tl.store(out + token * (NUM_HEADS * HEAD_DIM) + column, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=_SLICES)
def _scan_kernel(
    x, b, c, step, log_decay_rate, step_bias, skip, state, rows, query_start_loc, seq_lens,
    snapshots, out, x_stride, key_stride, query_stride, step_stride, state_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, STATE_DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SNAPSHOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of one head of a row with several tokens, chunk after chunk."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1)
    start = tl.load(query_start_loc + row).to(tl.int64)
    count = tl.load(query_start_loc + row + 1) - start.to(tl.int32)
    if count <= 1:  # `_step_kernel` computes rows with one token
        return
    TILES: tl.constexpr = HEAD_DIM // COLUMNS
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    dim, lane = tl.arange(0, STATE_DIM), tl.arange(0, 64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    states = state + head * STATE_DIM * HEAD_DIM + dim[:, None] * HEAD_DIM + column[None, :]
    own = states + tl.load(rows + row).to(tl.int64) * state_stride
    s = tl.load(own, tl.load(seq_lens + row) > count, other=0.0).to(tl.float32)
    rate, bias = -tl.exp(tl.load(log_decay_rate + head)), tl.load(step_bias + head)
    through = tl.load(skip + head)
    own_steps = step + start * step_stride + head
    dtype = x.dtype.element_ty
    border, num_parts = 0, 1
    if HAS_SNAPSHOTS:
        border = tl.load(snapshots + row * 2).to(tl.int32)
        num_parts = tl.where(border > 0, 2, 1)
    for part in range(num_parts):  # the tokens before the border, then the tokens after it
        low = tl.where(part == num_parts - 1, border, 0)
        high = tl.where(part == num_parts - 1, count, border)
        for first in range(low, high, 64):
            token = first + lane
            is_token = token < high
            # The compiler does not pipeline this load. It is issued early, so that it is in flight
            # during two products.
            steps = tl.load(own_steps + token * step_stride, is_token, other=0.0)
            place = (start + token)[:, None]
            group_dims = head // GROUP * STATE_DIM + dim[None, :]
            columns = head * HEAD_DIM + column[None, :]
            key = tl.load(b + place * key_stride + group_dims, is_token[:, None], other=0.0)
            query = tl.load(c + place * query_stride + group_dims, is_token[:, None], other=0.0)
            value = tl.load(x + place * x_stride + columns, is_token[:, None], other=0.0)
            score = product(query, tl.trans(key))
            result = product(query, s.to(dtype))
            size = tl.where(is_token, step_size(steps, bias), 0.0)
            total, chunk_total = tl.cumsum(rate * size, 0), tl.sum(rate * size, 0)
            is_after = lane[:, None] >= lane[None, :]
            between = tl.where(is_after, total[:, None] - total[None, :], float("-inf"))
            score *= tl.exp(between) * size[None, :]
            result *= tl.exp(total)[:, None]
            result += product(score.to(dtype), value) + through * value.to(tl.float32)
            target = out + place * (NUM_HEADS * HEAD_DIM) + columns
            tl.store(target, result.to(out.dtype.element_ty), is_token[:, None])
            update = value.to(tl.float32) * (size * tl.exp(chunk_total - total))[:, None]
            s = s * tl.exp(chunk_total) + product(tl.trans(key), update.to(dtype))
        if HAS_SNAPSHOTS:  # noqa: SIM102  (known to the compiler, unlike the next condition)
            if part < num_parts - 1:
                slot = states + tl.load(snapshots + row * 2 + 1) * state_stride
                tl.store(slot, s.to(state.dtype.element_ty))
    tl.store(own, s.to(state.dtype.element_ty))


def compute_states(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    step: Tensor,
    log_decay_rate: Tensor,
    step_bias: Tensor,
    skip: Tensor,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    row_bound: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """See `state_space.state_space`."""
    num_tokens, num_heads, head_dim = x.shape
    out = x.new_empty(x.shape)
    if not num_tokens:
        return out
    num_groups, state_dim = b.shape[1:]
    assert why_not_on_gpu(state_dim, head_dim) is None, (state_dim, head_dim)
    assert num_heads % num_groups == 0 and state[0].is_contiguous()
    assert log_decay_rate.dtype == step_bias.dtype == skip.dtype == torch.float32
    x, b, c = map(with_packed_heads, (x, b, c))
    step = step if step.stride(1) == 1 else step.contiguous()
    of_heads = log_decay_rate, step_bias, skip
    inputs = x, b, c, step, *of_heads, state, rows, query_start_loc, seq_lens
    strides = tuple(y.stride(0) for y in (x, b, c, step, state))
    constants = {
        "NUM_HEADS": num_heads, "GROUP": num_heads // num_groups, "STATE_DIM": state_dim,
        "HEAD_DIM": head_dim, **launch_options(),
    }  # fmt: skip
    t = step_tiling(head_dim)
    _step_kernel[(num_heads * (head_dim // t.columns), len(rows))](
        *inputs, out, *strides, COLUMNS=t.columns, num_warps=t.num_warps, **constants
    )
    if row_bound is None or max_row_tokens(row_bound) != 1:
        t = scan_tiling(x.dtype, state_dim, head_dim)
        _scan_kernel[(num_heads * (head_dim // t.columns), len(rows))](
            *inputs, rows if snapshots is None else snapshots, out, *strides, COLUMNS=t.columns,
            HAS_SNAPSHOTS=snapshots is not None, num_warps=t.num_warps, num_stages=t.num_stages,
            **constants,
        )  # fmt: skip
    return out
