"""Reads quantised tensors of GGUF files (ggml's block formats) without dequantising them.

Every row is a sequence of blocks of 32 or 256 numbers; the layouts are those of llama.cpp's
ggml-common.h. `dequantize` gives the same float32 bits as `gguf.quants.dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix, expect_finite, expect_matrix
from compiledllm.models.formats.packing import signed
from compiledllm.models.matrices import QuantSpec


def from_gguf(data: Tensor, kind: str) -> QuantizedMatrix:
    """A tensor's bytes as they are in the file, uint8 [N, bytes of a row] -> [N, K].

    kind: the name of the tensor's type, a key of `KINDS`. The result by kind, with d, m and dmin in
    float16 and sc and mn as int8 (`super_scales`: d, `super_minima`: -dmin):

        Q4_0         int4, zero 8, groups of 32    w = (q - 8) * d
        Q8_0         int8, groups of 32            w = q * d
        Q5_0         int8, groups of 32            w = (q - 16) * d
        Q4_1, Q5_1   int4, int8, groups of 32      w = q * d + m
        Q4_K, Q5_K   int4, int8, groups of 32      w = q * (d * sc) - dmin * mn
        Q6_K         int6, groups of 16            w = (q - 32) * (d * sc)

    Raises ValueError for another kind, for rows that are not whole blocks, and for infinities.
    """
    if kind not in KINDS:
        raise ValueError(f"GGUF's type {kind} cannot stay quantised; supported: {', '.join(KINDS)}")
    return KINDS[kind].read(check_blocks(data, kind))


def check_blocks(data: Tensor, kind: str) -> Tensor:
    """A tensor's bytes by block, uint8 [N, blocks, bytes]. Raises ValueError as `from_gguf`."""
    layout = KINDS[kind]
    expect_matrix("data", data, torch.uint8)
    if data.shape[1] % layout.num_bytes:
        raise ValueError(
            f"data has rows of {data.shape[1]} bytes, expected whole {kind} blocks of "
            f"{layout.num_bytes}"
        )
    blocks = data.reshape(data.shape[0], -1, layout.num_bytes)
    for field, start in layout.floats.items():
        expect_finite(f"field '{field}' of {kind} data", _float16(blocks, start))
    return blocks


def _read_q4_0(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix("int4", _rows(_halves(blocks[..., 2:18])), _float16(blocks, 0))


def _read_q4_1(blocks: Tensor) -> QuantizedMatrix:
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    return QuantizedMatrix("int4", _rows(_halves(blocks[..., 4:20])), d, minima=m)


def _read_q5_0(blocks: Tensor) -> QuantizedMatrix:
    codes = _halves(blocks[..., 6:22]) | _bits(blocks[..., 2:6]) << 4
    return QuantizedMatrix("int8", _rows(signed(codes, 16)), _float16(blocks, 0))


def _read_q5_1(blocks: Tensor) -> QuantizedMatrix:
    codes = _halves(blocks[..., 8:24]) | _bits(blocks[..., 4:8]) << 4
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    return QuantizedMatrix("int8", _rows(signed(codes, 0)), d, minima=m)


def _read_q8_0(blocks: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix("int8", _rows(signed(blocks[..., 2:], 0)), _float16(blocks, 0))


def _read_q4_k(blocks: Tensor) -> QuantizedMatrix:
    return _with_sub_scales("int4", _nibbles(blocks[..., 16:], 32), blocks)


def _read_q5_k(blocks: Tensor) -> QuantizedMatrix:
    low = _nibbles(blocks[..., 48:], 32)  # bit i of byte j is the fifth bit of number 32 * i + j
    high = blocks[..., None, 16:48] >> _shifts(blocks, 1, 8) & 1
    return _with_sub_scales("int8", signed(low | high.flatten(-2) << 4, 0), blocks)


def _read_q6_k(blocks: Tensor) -> QuantizedMatrix:
    low = _nibbles(blocks[..., :128], 64)
    high = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, 32)
    codes = low | (high >> _shifts(blocks, 2, 4) & 3).flatten(-3) << 4
    scales, d = signed(_rows(blocks[..., 192:208]), 0), _float16(blocks, 208)
    return QuantizedMatrix("int6", _rows(codes), scales, super_scales=d)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A block format of GGUF.

    num_bytes: bytes per block. read: blocks [N, blocks, num_bytes] -> matrix. spec: how the matrix
    is kept in memory. floats: ggml's name of each float16 number in a block -> its first byte.
    """

    num_bytes: int
    read: Callable[[Tensor], QuantizedMatrix]
    spec: QuantSpec
    floats: Mapping[str, int]


_INT4 = QuantSpec("int4", 32, scale_dtype="float16")
_INT8 = replace(_INT4, code="int8")
_INT4_K = QuantSpec("int4", 32, scale_dtype="int8", has_minima=True, span=256)
_INT8_K = replace(_INT4_K, code="int8")
_INT6_K = replace(_INT4_K, code="int6", group=16, has_minima=False)
KINDS = {
    "Q4_0": _Kind(18, _read_q4_0, _INT4, {"d": 0}),
    "Q4_1": _Kind(20, _read_q4_1, replace(_INT4, has_minima=True), {"d": 0, "m": 2}),
    "Q5_0": _Kind(22, _read_q5_0, _INT8, {"d": 0}),
    "Q5_1": _Kind(24, _read_q5_1, replace(_INT8, has_minima=True), {"d": 0, "m": 2}),
    "Q8_0": _Kind(34, _read_q8_0, _INT8, {"d": 0}),
    "Q4_K": _Kind(144, _read_q4_k, _INT4_K, {"d": 0, "dmin": 2}),
    "Q5_K": _Kind(176, _read_q5_k, _INT8_K, {"d": 0, "dmin": 2}),
    "Q6_K": _Kind(210, _read_q6_k, _INT6_K, {"d": 208}),
}


def _rows(parts: Tensor) -> Tensor:
    """[N, blocks, numbers] -> [N, blocks * numbers]."""
    return parts.reshape(parts.shape[0], -1)


def _float16(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block: [N, blocks]."""
    pairs = blocks[..., start : start + 2].clone(memory_format=torch.contiguous_format)
    return pairs.view(torch.float16).squeeze(-1)


def _shifts(blocks: Tensor, step: int, count: int) -> Tensor:
    """uint8 [count, 1]: 0, step, 2 * step, …"""
    return torch.arange(0, step * count, step, dtype=torch.uint8, device=blocks.device).view(-1, 1)


def _halves(packed: Tensor) -> Tensor:
    """[..., 16] -> [..., 32]: all low nibbles, then all high nibbles."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=-1)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """[..., bytes] -> [..., 2 * bytes]: low, then high nibbles of each run of `run` bytes."""
    return _halves(packed.reshape(*packed.shape[:-1], -1, run)).flatten(-2)


def _bits(packed: Tensor) -> Tensor:
    """[..., 4] -> [..., 32]: the bits, beginning with the lowest bit of the first byte."""
    return (packed.unsqueeze(-1) >> _shifts(packed, 1, 8).view(-1) & 1).flatten(-2)


def _with_sub_scales(code: str, codes: Tensor, blocks: Tensor) -> QuantizedMatrix:
    """The matrix of Q4_K or Q5_K, whose blocks begin with d, dmin, and sc and mn in twelve bytes.

    The twelve bytes hold eight pairs of 6-bit numbers. The first four sc are the low six bits of
    bytes 0 to 3, and the first four mn those of bytes 4 to 7. The other four sc and mn have their
    low four bits in bytes 8 to 11 (sc in the low nibble, mn in the high nibble), and their high two
    bits in the high two bits of bytes 0 to 3 (sc) and 4 to 7 (mn).
    """
    first_sc, first_mn, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    sc = torch.cat((first_sc & 0x3F, rest & 0x0F | first_sc >> 2 & 0x30), dim=-1)
    mn = torch.cat((first_mn & 0x3F, rest >> 4 | first_mn >> 2 & 0x30), dim=-1)
    d, dmin = _float16(blocks, 0), _float16(blocks, 2)
    return QuantizedMatrix(
        code,
        _rows(codes),
        _rows(sc.view(torch.int8)),
        minima=_rows(mn.view(torch.int8)),
        super_scales=d,
        super_minima=-dmin,
    )
