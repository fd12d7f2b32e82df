"""Unpacks integers of few bits, and permutations of inputs (act order), as files store them."""

from __future__ import annotations

import torch
from torch import Tensor

from compiledllm.models.formats.codes import expect_dtype, expect_shape


def unpack_bits(words: Tensor, num_bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, count], numbers of 1 to 8 bits.

    The words of a row are one stream of bits, the lowest bit first: number i takes the bits from
    i * num_bits on and may span two words. Memory: the result, and at most six times the result
    for widths that do not divide 8.
    """
    if words.stride(-1) != 1:  # contiguous() would keep the stride of a single column
        words = words.clone(memory_format=torch.contiguous_format)
    bytes_ = words.view(torch.uint8)  # of a little-endian machine
    mask = 2**num_bits - 1
    if 8 % num_bits == 0:
        shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8, device=words.device)
        numbers = (bytes_.unsqueeze(-1) >> shifts).bitwise_and_(mask)
        return numbers.flatten(-2)[:, :count].contiguous()
    starts = torch.arange(count, device=words.device) * num_bits
    pairs = bytes_.to(torch.int16)
    pairs[:, :-1] |= pairs[:, 1:].clone() << 8  # 16 bits from each byte on
    shifts = (starts % 8).to(torch.int16)
    spans: Tensor = pairs[:, starts // 8]
    return spans.bitwise_right_shift_(shifts).bitwise_and_(mask).to(torch.uint8)


def num_words(count: int, num_bits: int) -> int:
    """int32 words that hold `count` numbers."""
    return -(-count * num_bits // 32)


def unpack_nibble_bytes(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n], the low nibble of each byte first."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def signed(stored: Tensor, offset: int) -> Tensor:
    """uint8 numbers stored with an offset -> int8. The uint8 difference wraps to the right bits."""
    return torch.sub(stored, offset).view(torch.int8)


def input_order(field: str, g_idx: Tensor, k: int, group: int) -> Tensor | None:
    """The permutation of inputs after which each group's columns are adjacent, in stable order.

    g_idx: integers [K], the group of each input. Returns None if the columns need no reordering: if
    the groups are in order, or all entries are 0 or all are -1, which files use for "no order".
    Raises ValueError unless each of the ceil(K / group) groups has `group` inputs; the last group
    may have fewer.
    """
    expect_dtype(field, g_idx, torch.int32, torch.int64)
    expect_shape(field, g_idx, (k,))
    in_order = torch.arange(k, device=g_idx.device) // group
    if bool((g_idx == in_order).all() | (g_idx == 0).all() | (g_idx == -1).all()):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order].long(), in_order):
        raise ValueError(f"{field} does not put {group} inputs into each of its groups")
    return order
