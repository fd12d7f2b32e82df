"""The gated delta rule: linear attention whose state is one matrix per request and head.

    S = S * exp(log_decay);  S += key (beta * (value - key^T S));  out = query^T S

where log_decay = -exp(log_decay_rate) * softplus(a + step_bias) and beta = sigmoid(b).

A row with one token takes one step of the recurrence. A row with more tokens is computed in chunks
of CHUNK tokens: the updates of all tokens in a chunk are the solution of one triangular system, so
only the chunks must be computed in order. On a GPU, Triton kernels compute single steps
(`delta_rule_triton`) and chunks (`chunked_delta_rule_triton`); on other devices plain torch
computes both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.ops import define
from compiledllm.kernels.short_convolution import chunks_of_row, rows_alike

CHUNK = 64  # tokens
EPS = 1e-6  # added to the squared L2 norms of queries and keys
GPU_DIMS = (16, 32, 64, 128)  # head dimensions that the kernels for GPUs can compute


def why_not_on_gpu(key_dim: int, value_dim: int) -> str | None:
    """The reason why the kernels for GPUs cannot compute these heads; None if they can."""
    for dim in (key_dim, value_dim):
        if dim not in GPU_DIMS:
            return f"it has no kernels for heads of {dim} dimensions, only {GPU_DIMS}"
    return None


def _delta_rule_fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@define("gated_delta_rule", fake=_delta_rule_fake, mutates=("state",))
def gated_delta_rule(
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
) -> Tensor:
    """The gated delta rule over each row's tokens, from the row's state on.

    query, key: [tokens, key heads, key_dim], not yet normalised: each is divided by its L2 norm,
    and queries are scaled by key_dim ** -0.5. value: [tokens, value heads, value_dim]; value head h
    uses key head h // (value heads / key heads). a, b: [tokens, value heads], not yet activated.
    log_decay_rate, step_bias: float32 [value heads]. state: float32 or bfloat16 [request rows,
    value heads, key_dim, value_dim]. rows, query_start_loc, seq_lens, row_bound, snapshots: see
    `short_convolution.short_convolution`.

    A row without earlier tokens starts from zeros, whatever its state holds; a row without tokens
    does nothing. Mutates `state`. Returns [tokens, value heads, value_dim] in value's dtype,
    undefined for tokens outside every row.
    """
    tokens, gates = (query, key, value, a, b), (log_decay_rate, step_bias)
    rows_of_step = rows, query_start_loc, seq_lens
    if not value.is_cuda:
        return gated_delta_rule_reference(*tokens, *gates, state, *rows_of_step, snapshots)
    from compiledllm.kernels.delta_rule_triton import delta_rule

    return delta_rule(*tokens, *gates, state, *rows_of_step, row_bound, snapshots)


def activated_gates(
    a: Tensor, b: Tensor, log_decay_rate: Tensor, step_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """log_decay and beta, [tokens, value heads], in the dtype of `log_decay_rate` or a wider one.

    16 bits do not suffice: the decay is an exponential of an exponential, which would amplify the
    rounding errors.
    """
    dtype = torch.promote_types(a.dtype, log_decay_rate.dtype)
    log_decay = -log_decay_rate.exp() * F.softplus(a.to(dtype) + step_bias)
    return log_decay, torch.sigmoid(b.to(dtype))


def gated_delta_rule_reference(
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
    snapshots: Tensor | None = None,
) -> Tensor:
    """See `gated_delta_rule`. Rows with equal numbers of tokens and equal borders form a batch.

    Computes in float32, or in float64 if the inputs are.
    """
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(value.dtype, torch.float32)
    log_decay, beta = activated_gates(a, b, log_decay_rate, step_bias)
    group = value.shape[1] // key.shape[1]
    query = _normalized(query.to(dtype)) * query.shape[-1] ** -0.5
    key = _normalized(key.to(dtype))
    for (count, border), batch in rows_alike(query_start_loc, snapshots, len(rows)).items():
        first, own = query_start_loc[batch].long(), rows[batch].long()
        tokens = first[:, None] + torch.arange(count, device=out.device)  # [rows, count]
        is_new = (seq_lens[batch] == count).view(-1, 1, 1, 1)
        current = state[own].to(dtype).masked_fill(is_new, 0)
        for start, end in chunks_of_row(count, border, CHUNK):
            part = tokens[:, start:end]
            if border and start == border and snapshots is not None:
                state[snapshots[batch, 1]] = current.to(state.dtype)
            # [rows, tokens, heads, ...] -> [rows, heads, tokens, ...]
            q, k = (x[part].repeat_interleave(group, 2).transpose(1, 2) for x in (query, key))
            v, d, u = (x[part].to(dtype).transpose(1, 2) for x in (value, log_decay, beta))
            mixed = _step if count == 1 else _chunk
            result, current = mixed(q, k, v, d, u, current)
            out[part] = result.transpose(1, 2).to(out.dtype)
        state[own] = current.to(state.dtype)
    return out


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each row: [rows, heads, 1, ...]. Returns its output and the new state."""
    state = state * log_decay.exp()[..., None]
    update = beta[..., None] * (value - key @ state)
    state = state + key.mT * update
    return query @ state, state


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens of each row: [rows, heads, tokens, ...]. Returns outputs and the new state.

    Token i's update is u_i = beta_i (v_i - k_i^T S_i), where S_i contains the chunk's updates
    before i. With S, the state before the chunk, and D, the decay since then, this is the system
    (I + L) u = beta (v - D k^T S), where L_ij = beta_i (D_i / D_j) k_i^T k_j for i > j.
    """
    # [rows, heads, tokens]: log of the decay since the chunk began, the token's own included.
    total = log_decay.cumsum(-1)
    later = torch.ones(key.shape[-2:-1] * 2, dtype=torch.bool, device=key.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    since_start, until_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
    beta = beta[..., None]
    system = beta * between * (key @ key.mT)  # the solver replaces the diagonal by ones
    update = torch.linalg.solve_triangular(
        system, beta * (value - since_start * (key @ state)), upper=False, unitriangular=True
    )
    out = since_start * (query @ state) + (between * (query @ key.mT)) @ update
    state = since_start[..., -1:, :] * state + (until_end * key).mT @ update
    return out, state
