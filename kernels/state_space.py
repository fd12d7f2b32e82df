"""The state space of Mamba-2: linear attention whose state is one matrix per request and head.

    S = S * exp(log_decay);  S += b (step * x);  out = c^T S + skip * x

where step = softplus(step + step_bias) and log_decay = -exp(log_decay_rate) * step.

A row with one token takes one step of the recurrence. A row with more tokens is computed in chunks
of CHUNK tokens: matrix products compute what the tokens of a chunk contribute to each other, so
only the chunks must be computed in order. On a GPU, Triton kernels compute both
(`state_space_triton`); on other devices plain torch does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define
from compiledllm.kernels.short_convolution import chunks_of_row, rows_alike

CHUNK = 64  # tokens
GPU_DIMS = (16, 32, 64, 128)  # dimensions of states and heads that the kernels for GPUs can compute


def why_not_on_gpu(state_dim: int, head_dim: int) -> str | None:
    """The reason why the kernels for GPUs cannot compute these heads; None if they can."""
    for dim in (state_dim, head_dim):
        if dim not in GPU_DIMS:
            return f"it has no kernels for states or heads of {dim} dimensions, only {GPU_DIMS}"
    return None


def _state_space_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("state_space", fake=_state_space_fake, mutates=("state",))
def state_space(
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
    """The recurrence over each row's tokens, from the row's state on.

    x: [tokens, heads, head_dim]. b, c: [tokens, groups, state_dim]; head h uses group
    h // (heads / groups). step: [tokens, heads], not yet activated. log_decay_rate, step_bias,
    skip: float32 [heads]. state: float32 or bfloat16 [request rows, heads, state_dim, head_dim].
    rows, query_start_loc, seq_lens, row_bound, snapshots: see
    `short_convolution.short_convolution`.

    A row without earlier tokens starts from zeros, whatever its state holds; a row without tokens
    does nothing. Mutates `state`. Returns [tokens, heads, head_dim] in x's dtype, undefined for
    tokens outside every row.
    """
    tensors = x, b, c, step, log_decay_rate, step_bias, skip, state
    rows_of_step = rows, query_start_loc, seq_lens
    if not x.is_cuda:
        return state_space_reference(*tensors, *rows_of_step, snapshots)
    from compiledllm.kernels.state_space_triton import compute_states

    return compute_states(*tensors, *rows_of_step, row_bound, snapshots)


def state_space_reference(
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
    snapshots: Tensor | None = None,
) -> Tensor:
    """See `state_space`. Rows with equal numbers of tokens and equal borders form a batch.

    Computes in float32, or in float64 if the inputs are.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(x.dtype, torch.float32)
    group = x.shape[1] // b.shape[1]
    step = F.softplus(step.to(dtype) + step_bias)
    log_decay, scaled = -log_decay_rate.exp() * step, x.to(dtype) * step[..., None]
    for (count, border), batch in rows_alike(query_start_loc, snapshots, len(rows)).items():
        first, own = query_start_loc[batch].long(), rows[batch].long()
        tokens = first[:, None] + torch.arange(count, device=x.device)  # [rows, count]
        is_new = (seq_lens[batch] == count).view(-1, 1, 1, 1)
        current = state[own].to(dtype).masked_fill(is_new, 0)
        for start, end in chunks_of_row(count, border, CHUNK):
            if border and start == border and snapshots is not None:
                state[snapshots[batch, 1]] = current.to(state.dtype)
            part = tokens[:, start:end]
            # [rows, tokens, heads, ...] -> [rows, heads, tokens, ...]
            keys, queries = (
                y[part].to(dtype).repeat_interleave(group, 2).transpose(1, 2) for y in (b, c)
            )
            values, decay = (y[part].transpose(1, 2) for y in (scaled, log_decay))
            result, current = _chunk(queries, keys, values, decay, current)
            through = skip[:, None] * x[part].to(dtype)
            out[part] = (result.transpose(1, 2) + through).to(out.dtype)
        state[own] = current.to(state.dtype)
    return out


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens of each row: [rows, heads, tokens, ...]. Returns outputs and the new state."""
    # [rows, heads, tokens]: log of the decay since the chunk began, the token's own included.
    total = log_decay.cumsum(-1)
    later = torch.ones(key.shape[-2:-1] * 2, dtype=torch.bool, device=key.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    since_start, until_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
    out = since_start * (query @ state) + (between * (query @ key.mT)) @ value
    return out, since_start[..., -1:, :] * state + (until_end * key).mT @ value
