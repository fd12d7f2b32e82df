"""Mixture-of-experts routing in Triton: the choice of experts, and the items sorted by expert.

An item is a pair of a token and one of its experts. The choice runs one program per token, the sort
one program per expert. The host reads no results, so a captured call serves any choice of experts.
"""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, no-untyped-call"

from __future__ import annotations

from ctypes import c_int, c_longlong
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compiledllm.kernels.launch import launch_options

# Items. `_sort_kernel` reads all items twice per expert, so torch sorts more items than this.
_MAX_SORTED_BY_COUNTING = 16384
_MIN_BINS = 32  # tl.histogram needs at least as many bins as a warp has threads


@dataclass(frozen=True, slots=True)
class Routing:
    """Which items each block of the grid multiplies. An item is a pair of a token and an expert.

    block_experts: int32 [blocks], the expert of each block; num_experts or more: the block is
    empty. items: int32 [blocks * rows], indices of each block's items, where num_items or more
    means no item; None: block i has only item i, and `rows` is 1. rows: maximum number of items per
    block.
    """

    block_experts: Tensor
    items: Tensor | None
    rows: int
    num_items: int
    num_experts: int
    items_per_row: int  # items that share a row of x: top_k if rows are tokens, 1 if rows are items


def arguments_of(routing: Routing | None, codes: Tensor) -> tuple[Any, ...]:
    """The last arguments of CUDA kernels whose rows may be items: `routing`, and bytes per expert.

    codes: of the matrix, with a first dimension of experts if there is a routing.
    """
    if routing is None:
        return None, None, c_int(0), c_int(0), c_longlong(0)
    expert_bytes = c_longlong(codes.stride(0) * codes.itemsize)
    counts = c_int(routing.num_items), c_int(routing.num_experts)
    return routing.items, routing.block_experts, *counts, expert_bytes


@triton.jit
def _swap_order(bits):
    """Map the bits of a float32 to an int32 with the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ordered(rank):
    """float32 -> int32 in the same order. NaN counts as inf, and -0.0 equals 0.0."""
    rank = tl.where(rank == rank, rank, float("inf"))
    return _swap_order(tl.where(rank == 0, 0.0, rank).to(tl.int32, bitcast=True))


@triton.jit
def _within_best_groups(
    rank, expert, num_experts, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """`rank`, but -inf for all experts outside the best groups; see `moe._within_best_groups`.

    GROUPS: NUM_GROUPS, rounded up to a power of two.
    """
    taken = -0x80000000
    own, group = expert // (num_experts // NUM_GROUPS), tl.arange(0, GROUPS)
    keys = tl.full([GROUPS], taken, tl.int32)
    for g in tl.static_range(NUM_GROUPS):
        member = tl.where(own == g, rank, float("-inf"))
        best, index = tl.max(member, 0, return_indices=True)
        second = tl.max(tl.where(expert == index, float("-inf"), member), 0)
        second = tl.where(num_experts > NUM_GROUPS, second, 0.0)
        keys = tl.where(group == g, _ordered(best + second), keys)
    is_chosen = expert < 0
    for _ in tl.static_range(TOP_GROUPS):
        _, index = tl.max(keys, 0, return_indices=True, return_indices_tie_break_left=True)
        is_chosen = is_chosen | (own == index)
        keys = tl.where(group == index, taken, keys)
    return tl.where(is_chosen, rank, float("-inf"))


@triton.jit
def _route_kernel(
    logits, bias, shared_logit, ids, weights, row_stride, num_experts, eps, scale,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, IS_SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_SHARED_LOGIT: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, EXPERTS: tl.constexpr,
    PLACES: tl.constexpr, GROUPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Choose a token's experts, and compute their weights. See `moe.moe_route`.

    EXPERTS, PLACES, GROUPS: `num_experts`, TOP_K + HAS_SHARED and NUM_GROUPS, rounded up to powers
    of two.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, PLACES)
    is_expert, is_place = expert < num_experts, place < TOP_K + HAS_SHARED
    logit = tl.load(logits + token * row_stride + expert, is_expert, other=0.0).to(tl.float32)
    if IS_SIGMOID:
        score = 1 / (1 + tl.exp(-logit))
        all_scores = 1.0
    else:
        highest = tl.max(tl.where(is_expert, logit, float("-inf")), 0)
        score = tl.exp(logit - highest)  # times a factor that all experts share
        all_scores = tl.sum(tl.where(is_expert, score, 0.0), 0)
    rank = logit  # logits have the same order as scores, but are not rounded
    if NUM_GROUPS > 1:
        rank = score / all_scores
    if HAS_BIAS:
        rank = score / all_scores + tl.load(bias + expert, is_expert, other=0.0)
    if NUM_GROUPS > 1:
        rank = tl.where(rank == rank, rank, float("inf"))
        rank = tl.where(is_expert, rank, float("-inf"))
        rank = _within_best_groups(rank, expert, num_experts, NUM_GROUPS, TOP_GROUPS, GROUPS)
    taken = -0x80000000  # below -inf, so that no expert is chosen twice
    key = tl.where(is_expert, _ordered(rank), taken)
    best_scores = tl.zeros([PLACES], tl.float32)
    best_ids = tl.zeros([PLACES], tl.int32)
    for k in tl.static_range(TOP_K):
        _, index = tl.max(key, 0, return_indices=True, return_indices_tie_break_left=True)
        best_score = tl.sum(tl.where(expert == index, score, 0.0), 0)
        best_scores = tl.where(place == k, best_score, best_scores)
        best_ids = tl.where(place == k, index, best_ids)
        key = tl.where(expert == index, taken, key)
    total = all_scores
    if RENORMALIZE:
        total = tl.sum(best_scores, 0) + eps * all_scores
    best_weights = best_scores / total * scale
    if HAS_SHARED:
        share = 1.0
        if HAS_SHARED_LOGIT:
            share = 1 / (1 + tl.exp(-tl.load(shared_logit + token)))
        best_ids = tl.where(place == TOP_K, num_experts, best_ids)
        best_weights = tl.where(place == TOP_K, share, best_weights)
    target = token * (TOP_K + HAS_SHARED) + place
    tl.store(ids + target, best_ids, is_place)
    tl.store(weights + target, best_weights, is_place)


def route(
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None = None,
    scores: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    eps: float = 0.0,
    scale: float = 1.0,
    has_shared: bool = False,
    shared_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `moe.moe_route`."""
    num_tokens, num_experts = logits.shape
    assert top_k <= num_experts and logits.stride(1) == 1
    assert shared_logit is None or shared_logit.is_contiguous()
    num_places = top_k + has_shared
    ids = torch.empty(num_tokens, num_places, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, num_places, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits, logits if bias is None else bias,
            logits if shared_logit is None else shared_logit, ids, weights, logits.stride(0),
            num_experts, eps, scale, TOP_K=top_k, RENORMALIZE=renormalize,
            IS_SIGMOID=scores == "sigmoid", HAS_BIAS=bias is not None, HAS_SHARED=has_shared,
            HAS_SHARED_LOGIT=shared_logit is not None, NUM_GROUPS=num_groups,
            TOP_GROUPS=top_groups, EXPERTS=triton.next_power_of_2(num_experts),
            PLACES=triton.next_power_of_2(num_places),
            GROUPS=triton.next_power_of_2(num_groups), num_warps=1, **launch_options(),
        )  # fmt: skip
    return ids, weights


@triton.jit(do_not_specialize=["num_items", "num_blocks"])
def _sort_kernel(
    expert_ids, items, block_experts, num_items, num_experts, num_blocks,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program writes the items of one expert, their padding, and the expert's blocks.

    One further program, without an expert, writes the unused blocks. EXPERTS: a power of two, at
    least `num_experts`. TILE: items per iteration.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    own, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    lane, row = tl.arange(0, TILE), tl.arange(0, ROWS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_items, TILE):
        is_item = first + lane < num_items
        ids = tl.load(expert_ids + first + lane, is_item, other=0).to(tl.int32)
        counts += tl.histogram(ids, EXPERTS, mask=is_item)
    blocks = (counts + ROWS - 1) // ROWS
    first_block = tl.sum(tl.where(expert < own, blocks, 0), 0)
    end_block = first_block + tl.sum(tl.where(expert == own, blocks, 0), 0)
    end_block = tl.where(own == num_experts, num_blocks, end_block)
    place = first_block * ROWS  # next free place
    for first in range(0, num_items, TILE):
        item = first + lane
        ids = tl.load(expert_ids + item, item < num_items, other=-1).to(tl.int32)
        is_own = (ids == own).to(tl.int32)
        tl.store(items + place + tl.cumsum(is_own, 0) - 1, item, is_own == 1)
        place += tl.sum(is_own, 0)
    tl.store(items + place + row, num_items, place + row < end_block * ROWS)
    for first in range(first_block, end_block, ROWS):
        tl.store(block_experts + first + row, own, first + row < end_block)


def sort_items(expert_ids: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sort items by expert: item indices int32 [blocks * rows] and experts int32 [blocks].

    expert_ids: integers [tokens, top_k]. Every expert's items are in ascending order and padded to
    whole blocks of `rows` with the number of items. Unused blocks have expert `num_experts`, and
    their item indices are undefined.
    """
    ids, num_items = expert_ids.reshape(-1), expert_ids.numel()
    max_used = min(num_items, num_experts)
    num_blocks = max_used + (num_items - max_used) // rows
    items = torch.empty(num_blocks * rows, dtype=torch.int32, device=ids.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    if num_items > _MAX_SORTED_BY_COUNTING:
        _sort_in_torch(ids, items, block_experts, num_experts)
    else:
        _sort_kernel[(num_experts + 1,)](
            ids, items, block_experts, num_items, num_experts, num_blocks,
            EXPERTS=max(triton.next_power_of_2(num_experts), _MIN_BINS), ROWS=rows,
            TILE=128 if num_items <= 128 else 1024, **launch_options(),
        )  # fmt: skip
    return items, block_experts


def _sort_in_torch(ids: Tensor, items: Tensor, block_experts: Tensor, num_experts: int) -> None:
    """The same result as `_sort_kernel`, for any number of items."""
    rows = len(items) // len(block_experts)
    ids = ids.long()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    padded = (counts + rows - 1) // rows * rows
    ends = padded.cumsum(0)
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    rank = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[sorted_ids]
    items.fill_(len(ids))
    items[(ends - padded)[sorted_ids] + rank] = order.int()
    starts = torch.arange(len(block_experts), device=ids.device) * rows
    block_experts.copy_(torch.searchsorted(ends, starts, right=True))
