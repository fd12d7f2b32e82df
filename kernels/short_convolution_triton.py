"""The short convolution in Triton: one kernel for steps of single tokens, one for ragged rows."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.backend import max_row_tokens
from compiledllm.kernels.launch import launch_options
from compiledllm.kernels.ragged_triton import row_of_piece

_TOKENS, _CHANNELS = 16, 64  # of a program of `_ragged_kernel`; the fastest of 11 on an H200
_STEP_CHANNELS = 256  # of a program of `_step_kernel`
# Slices of packed inputs, which begin at any address: Triton must not specialise on alignment.
_SLICES = ["rows", "snapshots"]


@triton.jit
def _activated(x, IS_SILU: tl.constexpr):
    if IS_SILU:
        x = x / (1 + tl.exp(-x))
    return x


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _step_kernel(
    x, weight, bias, state, rows, query_start_loc, seq_lens, out, channels, x_stride, state_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_SILU: tl.constexpr,
    CHANNELS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some channels of a row with one token. PADDED: WIDTH, rounded up to a power of two."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1)
    token, end = tl.load(query_start_loc + row).to(tl.int64), tl.load(query_start_loc + row + 1)
    slot, length = tl.load(rows + row).to(tl.int64), tl.load(seq_lens + row)
    if end == token:  # after the loads, which are in flight together
        return
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    entry = tl.arange(0, PADDED)
    is_channel, is_state = channel < channels, entry < WIDTH - 1
    is_old = is_channel & (length > 1)
    own = state + slot * state_stride + channel[:, None] * (WIDTH - 1) + entry[None, :]
    inside = is_channel[:, None] & (entry < WIDTH)[None, :]
    old = tl.load(own, is_old[:, None] & is_state[None, :], other=0.0)
    new = tl.load(x + token * x_stride + channel, is_channel, other=0.0)
    window = tl.where((entry == WIDTH - 1)[None, :], new[:, None], old)  # [channels, entries]
    weights = tl.load(weight + channel[:, None] * WIDTH + entry[None, :], inside, other=0.0)
    total = tl.sum(window.to(tl.float32) * weights.to(tl.float32), 1)
    if HAS_BIAS:
        total += tl.load(bias + channel, is_channel, other=0.0).to(tl.float32)
    result = _activated(total, IS_SILU).to(out.dtype.element_ty)
    tl.store(out + token * channels + channel, result, is_channel)
    tl.debug_barrier()  # until all threads have read the state
    tl.store(own - 1, window, inside & (entry > 0)[None, :])


@triton.jit
def _window(inputs, x_stride, old, is_old, is_entry, entry, count, WIDTH: tl.constexpr):
    """The last WIDTH - 1 inputs before token `count` of a row.

    old: the addresses of the row's stored state, which has the inputs before this step.
    """
    origin = count - (WIDTH - 1) + entry  # index in this step's tokens; negative: in the old state
    recent = inputs[None, :] + origin.to(tl.int64) * x_stride
    window = tl.load(recent, is_entry & (origin >= 0), other=0.0)
    return window + tl.load(old + count, is_old & (origin < 0), other=0.0)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_SLICES)
def _ragged_kernel(
    x, weight, bias, state, rows, query_start_loc, seq_lens, snapshots, out, channels, x_stride,
    state_stride, num_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_SNAPSHOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some tokens and channels of a row. Only a row's first program touches the row's state."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.program_id(1)
    row, first_piece = row_of_piece(index, query_start_loc, num_rows, TOKENS)
    start = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - start
    first = (index - first_piece) * TOKENS
    if first >= count:
        return
    token = first + tl.arange(0, TOKENS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    is_old = is_channel & (tl.load(seq_lens + row) > count)
    inside = (token < count)[:, None] & is_channel[None, :]
    own = state + tl.load(rows + row).to(tl.int64) * state_stride + channel * (WIDTH - 1)
    inputs = x + start.to(tl.int64) * x_stride + channel
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for j in tl.static_range(WIDTH):
        source = token - (WIDTH - 1) + j
        is_new = inside & (source >= 0)[:, None]
        offset = source.to(tl.int64)[:, None] * x_stride
        value = tl.load(inputs[None, :] + offset, is_new, other=0.0)
        if first == 0:
            before = inside & (source < 0)[:, None] & is_old[None, :]
            value += tl.load(own[None, :] + (source + WIDTH - 1)[:, None], before, other=0.0)
        w = tl.load(weight + channel * WIDTH + j, is_channel, other=0.0).to(tl.float32)
        total += value.to(tl.float32) * w[None, :]
    if HAS_BIAS:
        total += tl.load(bias + channel, is_channel, other=0.0).to(tl.float32)[None, :]
    result = _activated(total, IS_SILU).to(out.dtype.element_ty)
    target = out + (start + token).to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(target, result, inside)
    if first == 0:
        entry = tl.arange(0, PADDED)[:, None]
        is_entry = (entry < WIDTH - 1) & is_channel[None, :]
        old, is_kept = own[None, :] + entry, is_entry & is_old[None, :]
        moved = _window(inputs, x_stride, old, is_kept, is_entry, entry, count, WIDTH)
        if HAS_SNAPSHOTS:
            border = tl.load(snapshots + row * 2).to(tl.int32)
            window = _window(inputs, x_stride, old, is_kept, is_entry, entry, border, WIDTH)
            slot = state + tl.load(snapshots + row * 2 + 1) * state_stride + channel * (WIDTH - 1)
            tl.store(slot[None, :] + entry, window, is_entry & (border > 0))
        tl.debug_barrier()  # until all threads have read the state
        tl.store(own[None, :] + entry, moved, is_entry)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    activation: str,
    row_bound: Tensor | None = None,
    snapshots: Tensor | None = None,
) -> Tensor:
    """See `short_convolution.short_convolution`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_tokens, channels), num_rows, width = x.shape, len(rows), weight.shape[1]
    assert 2 <= width <= _TOKENS and weight.is_contiguous() and state[0].is_contiguous()
    out = x.new_empty((num_tokens, channels))
    if not num_tokens:
        return out
    tensors = x, weight, weight if bias is None else bias, state, rows, query_start_loc, seq_lens
    strides = channels, x.stride(0), state.stride(0)
    constants = {
        "WIDTH": width, "PADDED": triton.next_power_of_2(width), "HAS_BIAS": bias is not None,
        "IS_SILU": activation == "silu", **launch_options(),
    }  # fmt: skip
    if row_bound is not None and max_row_tokens(row_bound) == 1:
        grid = triton.cdiv(channels, _STEP_CHANNELS), num_rows
        _step_kernel[grid](*tensors, out, *strides, CHANNELS=_STEP_CHANNELS, **constants)
    else:
        snapshots_or_rows = rows if snapshots is None else snapshots  # without snapshots never read
        _ragged_kernel[(triton.cdiv(channels, _CHANNELS), num_tokens // _TOKENS + num_rows)](
            *tensors, snapshots_or_rows, out, *strides, num_rows, TOKENS=_TOKENS,
            CHANNELS=_CHANNELS, HAS_SNAPSHOTS=snapshots is not None, **constants,
        )  # fmt: skip
    return out
