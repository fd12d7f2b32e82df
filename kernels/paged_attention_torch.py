"""Paged attention in plain torch: the CPU path, and the reference of all backends in tests.

Decode rows (one new token) of similar length are computed together, over padded contexts. Prefill
chunks (several new tokens) are computed one row at a time as dense causal attention. No code loops
over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiledllm.kernels.backend import (
    MAX_FP8,
    AttentionBackend,
    AttentionMetadata,
    ScoreOptions,
)


def store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    """See `attention.store_kv`. Stores nothing for slot -1.

    The null block stays zero, because masked positions read it and a mask does not stop a NaN.
    """
    num_kv_heads, head_dim = kv_cache.shape[-2:]
    if (is_padding := slot_mapping < 0).any():
        there = ~is_padding
        key, value, slot_mapping = key[there], value[there], slot_mapping[there]
    if kv_scales is not None:
        key, value = (
            (x.float() / scale).clamp(-MAX_FP8, MAX_FP8).to(kv_cache.dtype)
            for x, scale in zip((key, value), kv_scales, strict=True)
        )
    for part, new in ((kv_cache[0], key), (kv_cache[1], value)):
        slots = _as_bytes(part).view(-1, num_kv_heads, head_dim)
        slots.index_copy_(0, slot_mapping, _as_bytes(new))


def _as_bytes(x: Tensor) -> Tensor:
    """FP8 as uint8, since torch indexes few FP8 tensors; other tensors unchanged."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def paged_attention(
    query: Tensor, kv_cache: Tensor, attn: AttentionMetadata, options: ScoreOptions
) -> Tensor:
    """See `attention.paged_attention`."""
    if options.kv_scales is not None:
        key_scale, value_scale = options.kv_scales.tolist()
        options = options._replace(scale=options.scale * key_scale, kv_scales=None)
        return paged_attention(query, kv_cache, attn, options).mul_(value_scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    block_tables = attn.block_tables
    starts, lengths = attn.query_start_loc.tolist(), attn.seq_lens.tolist()
    skipped = [0] * len(lengths)
    if options.sliding_window:
        block_tables, skipped = _in_window(
            block_tables, lengths, starts, options, kv_cache.shape[2]
        )
        lengths = [length - n for length, n in zip(lengths, skipped, strict=True)]
    # Decode rows, grouped so that lengths in a group differ by less than a factor of two.
    groups: dict[int, list[int]] = {}
    for row, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if end - start == 1:
            groups.setdefault((lengths[row] - 1).bit_length(), []).append(row)
        elif end > start:
            k, v = _gather(kv_cache, block_tables[row : row + 1], lengths[row], query.dtype)
            out[start:end] = _prefill_row(query[start:end], k, v, skipped[row], options)
    for rows in groups.values():
        tokens = [starts[row] for row in rows]
        row_lengths = [lengths[row] for row in rows]
        decoded = _decode_rows(
            _pick(query, tokens),
            *_gather(kv_cache, _pick(block_tables, rows), max(row_lengths), query.dtype),
            row_lengths,
            [skipped[row] for row in rows],
            options,
        )
        if len(tokens) == len(query):
            return decoded
        out[tokens] = decoded
    return out


def _first_seen(position: Any, options: ScoreOptions) -> Any:
    """The first position that a token at `position` sees; may be negative, which means 0.

    position: a number or an integer tensor. Returns the same type.
    """
    window = options.sliding_window
    return position // window * window if options.in_chunks else position - window + 1


def _in_window(
    block_tables: Tensor,
    lengths: list[int],
    starts: list[int],
    options: ScoreOptions,
    block_size: int,
) -> tuple[Tensor, list[int]]:
    """Block tables without the leading blocks that no token sees, and the tokens of these blocks.

    The second result is a number of tokens for each row.
    """
    oldest = (
        length - (end - start)
        for length, start, end in zip(lengths, starts, starts[1:], strict=False)
    )
    skipped = [max(_first_seen(position, options), 0) // block_size for position in oldest]
    if not any(skipped):
        return block_tables, [0] * len(lengths)
    longest = max(length - n * block_size for length, n in zip(lengths, skipped, strict=True))
    columns = torch.arange(-(-longest // block_size), device=block_tables.device)
    columns = torch.tensor(skipped, device=block_tables.device)[:, None] + columns
    block_tables = block_tables.gather(1, columns.clamp(max=block_tables.shape[1] - 1))
    return block_tables, [n * block_size for n in skipped]


def _pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """tensor[rows], without a copy when the rows are contiguous."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[rows]


def _gather(
    kv_cache: Tensor, block_tables: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values in `dtype`, each [rows, num_kv_heads, length, head_dim]."""
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_rows, num_blocks = len(block_tables), -(-length // block_size)
    ids = block_tables[:, :num_blocks].reshape(-1)

    def rows_of(part: Tensor) -> Tensor:
        blocks = _as_bytes(part).index_select(0, ids).view(kv_cache.dtype)
        flat = blocks.view(num_rows, -1, num_kv_heads, head_dim)
        return flat[:, :length].transpose(1, 2).to(dtype)

    return rows_of(kv_cache[0]), rows_of(kv_cache[1])


def _decode_rows(
    query: Tensor,  # [rows, num_heads, head_dim], one token per row
    k: Tensor,  # [rows, num_kv_heads, max_length, head_dim], as v
    v: Tensor,
    lengths: list[int],  # of each row's context in k and v
    skipped: list[int],  # number of each row's tokens before k and v
    options: ScoreOptions,
) -> Tensor:
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, max_length = k.shape[1], k.shape[2]
    # The query heads of a KV head see the same context, so they stand in for query positions.
    q = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = None
    if options.sliding_window or min(lengths) < max_length:
        end = torch.tensor(lengths, device=query.device).view(-1, 1, 1, 1)
        position = torch.arange(max_length, device=query.device)
        mask = position < end  # [rows, 1, 1, max_length]
        if options.sliding_window:
            before = torch.tensor(skipped, device=query.device).view(-1, 1, 1, 1)
            mask &= position >= _first_seen(end - 1 + before, options) - before
    return _attend(q, k, v, mask, False, options).reshape(query.shape)


def _prefill_row(
    query: Tensor,  # [tokens, num_heads, head_dim] of one row
    k: Tensor,  # [1, num_kv_heads, length, head_dim], as v
    v: Tensor,
    skipped: int,  # number of the row's tokens before k and v
    options: ScoreOptions,
) -> Tensor:
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, length = k.shape[1], k.shape[2]
    q = query.transpose(0, 1).unsqueeze(0)  # [1, num_heads, tokens, head_dim]
    if num_heads != num_kv_heads:
        k = k.repeat_interleave(num_heads // num_kv_heads, dim=1)
        v = v.repeat_interleave(num_heads // num_kv_heads, dim=1)
    mask = None
    is_causal = num_tokens == length and not options.sliding_window and _is_plain(options)
    if not is_causal:
        position = torch.arange(length, device=query.device)
        last = torch.arange(length - num_tokens, length, device=query.device)[:, None]
        mask = position <= last  # [tokens, length]
        if options.sliding_window:
            mask &= position >= _first_seen(last + skipped, options) - skipped
    return _attend(q, k, v, mask, is_causal, options).squeeze(0).transpose(0, 1)


def _is_plain(options: ScoreOptions) -> bool:
    """Whether torch's scaled_dot_product_attention supports these options."""
    return not options.soft_cap and options.sinks is None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    options: ScoreOptions,
) -> Tensor:
    """softmax(q k^T * scale) v over [rows, heads, queries, head_dim]."""
    if _is_plain(options):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=options.scale
        )
    scores = (q.float() @ k.float().transpose(-1, -2)) * options.scale
    if options.soft_cap:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        # The heads of `q` are KV heads, with query heads as positions (decode), or all query heads.
        sinks = options.sinks.float().view(q.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[-2]]
    return (weights @ v.float()).to(q.dtype)


class TorchBackend(AttentionBackend):
    """Runs every model; reads lengths on the host, so no step can be captured."""

    captures = captures_prompts = False
    fuses_rotation = False
    store_kv = staticmethod(store_kv)
    paged_attention = staticmethod(paged_attention)
