"""Splits tensors and quantised matrices alike: by rows, by experts and by ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix, dequantize, with_row_scales
from compiledllm.models.shards import Shard

# Fields of QuantizedMatrix that have a row for each output or each block of outputs.
_OF_SCALES = ("scales", "zeros", "minima", "super_scales", "super_minima")
_CHUNK = 2**22  # numbers of a matrix that are dequantised at a time
Content = Tensor | QuantizedMatrix  # an entry of a checkpoint, after `gather`


def shape_of(stored: Content) -> list[int]:
    return list((stored if isinstance(stored, Tensor) else stored.codes).shape)


def split_rows(stored: Content, sizes: Sequence[int]) -> Sequence[Content]:
    """Split into parts of `sizes` rows, from the top."""
    if isinstance(stored, Tensor):
        return torch.split(stored, list(sizes))
    if len(sizes) == 1:
        return [stored]
    if stored.block and any(size % stored.block for size in sizes[:-1]):
        stored = with_row_scales(stored)
    ends = itertools.accumulate(sizes)
    return [_rows(stored, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def take(stored: Content, shard: Shard, dim: int) -> Content:
    """A rank's part of the rows (dim 0) or columns (dim 1), with zeros for the shard's padding."""
    if isinstance(stored, QuantizedMatrix):
        return _take_rows(stored, shard) if dim == 0 else _columns(stored, *shard.ranges[0])
    if dim == 1:
        ((start, end),) = shard.ranges
        return stored[:, start:end]
    return _joined(stored, shard.ranges, shard.held)


def _take_rows(stored: QuantizedMatrix, shard: Shard) -> QuantizedMatrix:
    size = stored.rows
    if any(start % size or (end % size and end < shard.size) for start, end in shard.ranges):
        stored, size = with_row_scales(stored), 1
    of_scales = [(start // size, -(-end // size)) for start, end in shard.ranges]
    return _each(
        stored,
        lambda codes: _joined(codes, shard.ranges, shard.held),
        lambda scales: _joined(scales, of_scales, -(-shard.held // size)),
    )


def _joined(tensor: Tensor, ranges: Sequence[tuple[int, int]], num_rows: int) -> Tensor:
    """The ranges of rows, one after the other, and then zeros up to `num_rows` rows."""
    parts = [tensor[start:end] for start, end in ranges]
    if len(parts) == 1 and len(parts[0]) == num_rows:
        return parts[0]
    shape = num_rows, *tensor.shape[1:]
    joined = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    first = 0
    for part in parts:  # not all dtypes can be concatenated
        joined[first : first + len(part)].copy_(part)
        first += len(part)
    return joined


def _columns(matrix: QuantizedMatrix, start: int, end: int) -> QuantizedMatrix:
    """The columns from `start` to `end`, both of which must be borders of groups."""
    assert matrix.permutation is None, "sharded_spec refuses permutations"
    num_columns = matrix.codes.shape[-1]

    def of_group(part: Tensor) -> Tensor:
        size = matrix.group if part.shape == matrix.scales.shape else num_columns // part.shape[-1]
        if size >= num_columns:
            return part
        assert start % size == 0 and (end % size == 0 or end == num_columns), (start, end, size)
        return part[..., start // size : -(-end // size)]

    return _each(matrix, lambda codes: codes[..., start:end], of_group)


def dequantize_into(matrix: QuantizedMatrix, out: Tensor) -> None:
    """Write a matrix in floating point, some rows at a time to save memory."""
    num_rows, num_columns = matrix.codes.shape
    size = max(_CHUNK // num_columns // matrix.rows, 1) * matrix.rows
    for start in range(0, num_rows, size):
        end = min(start + size, num_rows)
        out[start:end].copy_(dequantize(_rows(matrix, start, end)))


def even_then_odd_rows(stored: Content) -> Content:
    """Reorder the rows: 0, 2, 4, ... and then 1, 3, 5, ..."""

    def reorder(part: Tensor) -> Tensor:
        return torch.cat((part[0::2], part[1::2]))

    if isinstance(stored, Tensor):
        return reorder(stored)
    return _each(with_row_scales(stored), reorder)


def experts_of(stored: QuantizedMatrix) -> Iterator[QuantizedMatrix]:
    """The matrix of each expert, from tensors with a leading dimension of experts."""
    return (_each(stored, itemgetter(expert)) for expert in range(len(stored.codes)))


def _rows(matrix: QuantizedMatrix, start: int, end: int) -> QuantizedMatrix:
    code_rows = itemgetter(slice(start, end))
    scale_rows = itemgetter(slice(start // matrix.rows, -(-end // matrix.rows)))
    return _each(matrix, code_rows, scale_rows)


def _each(
    matrix: QuantizedMatrix,
    change: Callable[[Tensor], Tensor],
    change_scales: Callable[[Tensor], Tensor] | None = None,
) -> QuantizedMatrix:
    """The matrix with `change` applied to each tensor that has rows.

    change_scales: applied instead of `change` to all tensors but the codes.
    """
    parts = {name: getattr(matrix, name) for name in _OF_SCALES}
    changed: dict[str, Any] = {
        name: (change_scales or change)(part) for name, part in parts.items() if part is not None
    }
    return replace(matrix, codes=change(matrix.codes), **changed)
