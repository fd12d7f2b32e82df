"""The layouts of 4-bit, 6-bit and int8 weights in which `cuda/linear.cu` reads them.

A matrix is divided into tiles of 16 outputs and units of 128 inputs. A record holds the 4- or 6-bit
codes of one tile and one unit, together with their scales and zeros, so that a thread copies the
record to shared memory as one piece. Four lanes of a warp share an output. A quarter is 32 of a
unit's inputs, 8 for each of these four lanes. A record consists of:

- codes, [2, 8, 4, 4] words of 32 bits: half of the tile, output in the half, lane, quarter. A word
  has the eight codes of inputs 32 * quarter + 8 * lane + (0 ... 7): inputs 0, 2, 4, 6 in its lower
  16 bits and inputs 1, 3, 5, 7 in its upper 16 bits. An int4 code takes four neighbouring bits, and
  the first input has the lowest bits. The bits of an E2M1 code lie apart (`_E2M1_BITS`). Of a 6-bit
  code, the word has the lower four bits, and the lane's inputs are 4 * lane + (0 ... 3) of each
  half of the quarter, because each half (16 inputs) has its own scale.
- the upper two bits of 6-bit codes, [2, 8, 4, 2] words: half of the tile, output in the half, lane,
  half of the unit. A word has two quarters: one in bits 0 to 7 and 16 to 23, the other in bits 8 to
  15 and 24 to 31. Within a quarter, codes follow each other in the order of their lower bits.
- scales, [8, 2, groups]: output in the half, half, group of the unit's inputs. Minima and factors,
  if there are any, follow the scales of each output (`with_minima`).
- zeros, uint8 [8, 2, groups], if the codes have any.

int8 codes are not in records but in rows, one row per output. A unit of a row is [2 pairs of
quarters, 4 lanes, 2 quarters, 8 inputs] bytes: 16 consecutive bytes are one lane's codes in two
quarters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # outputs
UNIT = 128  # inputs
_CHUNK = 2**24  # codes that are packed at a time
# For each of the four E2M1 codes in 16 bits, the positions of the code's bits, the lowest bit
# first. From these positions few instructions make a bfloat16 (`unpack_nibbles` in
# `cuda/codes.cuh`).
_E2M1_BITS = ((6, 7, 8, 15), (0, 1, 2, 9), (3, 4, 5, 12), (10, 11, 13, 14))


def pack_records(
    codes: Tensor, scales: Tensor | None, zeros: Tensor | None, code: str = "int4"
) -> Tensor:
    """Pack codes of 4 or 6 bits into records, uint8 [ceil(N / 16), ceil(K / 128), record bytes].

    codes: uint8 [N, K]. code: "int4", "fp4" or "int6". scales (1 to 4 bytes each), zeros (uint8):
    [N, groups * ceil(K / 128)] with 1, 2, 4 or 8 groups per 128 inputs, or None. Works through the
    rows in chunks, to save memory.
    """
    num_outputs, num_inputs = codes.shape
    size = max(_CHUNK // num_inputs // TILE, 1) * TILE
    records: Tensor | None = None
    for start in range(0, num_outputs, size):
        rows = slice(start, start + size)
        own_scales, own_zeros = (None if p is None else p[rows] for p in (scales, zeros))
        chunk = _pack_chunk(codes[rows], own_scales, own_zeros, code)
        if records is None:
            records = chunk.new_empty(-(-num_outputs // TILE), *chunk.shape[1:])
        records[start // TILE :][: len(chunk)] = chunk
    assert records is not None, "a matrix has outputs"
    return records


def _pack_chunk(codes: Tensor, scales: Tensor | None, zeros: Tensor | None, code: str) -> Tensor:
    num_outputs, num_inputs = codes.shape
    num_units = -(-num_inputs // UNIT)
    codes = F.pad(codes, (0, -num_inputs % UNIT, 0, -num_outputs % TILE)).int()
    eights = _by_lane(codes.view(-1, 2, 8, num_units, 4, 32), code)
    words = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(8):
        words |= _in_half(eights[..., i], i // 2, code) << 16 * (i % 2)
    words = words.permute(0, 3, 1, 2, 5, 4)  # tile, unit, half, output, lane, quarter
    parts = [words.reshape(*words.shape[:2], -1).view(torch.uint8)]
    if code == "int6":
        parts.append(_upper_bits(eights >> 4))
    for part in (scales, zeros):
        if part is not None:
            parts.append(_records_of_groups(part, num_units))
    return torch.cat(parts, dim=-1)


def _in_half(codes: Tensor, place: int, code: str) -> Tensor:
    """The lower four bits of int32 codes, moved to the bits of their place in 16 bits.

    place: 0 to 3, the code's index among the four codes in 16 bits.
    """
    if code != "fp4":
        return (codes & 15) << 4 * place
    found = torch.zeros_like(codes)
    for bit, to in enumerate(_E2M1_BITS[place]):
        found |= (codes >> bit & 1) << to
    return found


def _by_lane(quarters: Tensor, code: str) -> Tensor:
    """[..., 32 inputs of a quarter] -> [..., lane, 8]: the inputs of each of four lanes."""
    shape = quarters.shape[:-1]
    if code != "int6":
        return quarters.view(*shape, 4, 8)
    return quarters.view(*shape, 2, 4, 4).transpose(-3, -2).flatten(-2)


def _upper_bits(eights: Tensor) -> Tensor:
    """Two bits of [tile, half, output, unit, quarter, lane, 8] -> uint8 [tile, unit, bytes]."""
    words = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=eights.device)
    for i in range(8):
        words |= eights[..., i] << 2 * (i // 2) + 16 * (i % 2)
    words = words[..., 0::2, :] | words[..., 1::2, :] << 8  # tile, half, output, unit, half, lane
    words = words.permute(0, 3, 1, 2, 5, 4)
    return words.reshape(*words.shape[:2], -1).view(torch.uint8)


def with_minima(
    scales: Tensor, minima: Tensor | None, factors: Tensor | None, num_units: int
) -> Tensor:
    """Join scales, minima and factors in the order in which the kernels read them.

    For each output and unit, the result has the scales of the unit's groups, then the groups'
    minima, then the two factors. scales, minima: [N, groups * num_units] of one dtype, which is
    int8 if there are factors. factors: float16 [N, S, 2], each pair for num_units / S units; or
    None. Returns [N, numbers * num_units] in the scales' dtype, where the two factors of a unit
    take the place of four int8 numbers.
    """
    num_outputs = scales.shape[0]
    parts = [p.reshape(num_outputs, num_units, -1) for p in (scales, minima) if p is not None]
    if factors is not None:
        unit_factors = factors.repeat_interleave(num_units // factors.shape[1], 1)
        parts.append(unit_factors.contiguous().view(torch.int8))
    return torch.cat(parts, dim=-1).flatten(1)


def _records_of_groups(part: Tensor, num_units: int) -> Tensor:
    """[N, groups of K] -> uint8 [tiles, units, bytes of 16 outputs and 128 inputs]."""
    part = part.contiguous().view(torch.uint8).view(part.shape[0], num_units, -1)
    part = F.pad(part, (0, 0, 0, 0, 0, -part.shape[0] % TILE))
    by_tile = part.view(-1, 2, 8, *part.shape[1:])  # tile, half, output, unit, bytes
    return by_tile.permute(0, 3, 2, 1, 4).reshape(by_tile.shape[0], num_units, -1)


def pack_bytes(codes: Tensor) -> Tensor:
    """Reorder int8 codes [N, K] as the module's docstring says: [N, K rounded up to 128]."""
    codes = F.pad(codes, (0, -codes.shape[1] % UNIT))
    units = codes.view(len(codes), -1, 2, 2, 4, 8)  # pair of quarters, quarter, lane
    return units.transpose(3, 4).reshape(codes.shape)
