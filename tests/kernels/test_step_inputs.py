"""Triton's inputs of a step, and its update of the rows, against the torch ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiledllm.kernels import step_inputs_triton
from compiledllm.kernels.backend import AttentionMetadata
from compiledllm.kernels.step_inputs import (
    advance,
    decode_inputs,
    last_token_metadata,
    mixed_inputs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
REQUESTS = 9  # and behind them the row of padding


def state(num_groups: int, max_blocks: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """last_token_ids, num_computed_tokens and block_tables, with stale blocks behind contexts."""
    most = max_blocks * block_size - 1
    borders = [0, 1, block_size - 1, block_size, block_size + 1, most - block_size, most]
    computed = torch.cat((torch.tensor(borders), torch.randint(most, (REQUESTS - 7,))))
    computed = torch.cat((computed.clamp(0, most), torch.zeros(1, dtype=torch.int64)))
    tables = torch.randint(1, 2**31 - 1, (num_groups, REQUESTS + 1, max_blocks), dtype=torch.int32)
    tables[:, REQUESTS] = 0
    return torch.randint(50000, (REQUESTS + 1,)), computed, tables


@pytest.mark.pairwise
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("max_blocks", [1, 7, 1024, 2500])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("rows", [[4], [REQUESTS], [8, 1, 2, 0, 3, 6, 5, 4, 7], [5, 6, 9, 9, 9]])
def test_inputs_are_those_of_torch(
    rows: list[int], num_groups: int, max_blocks: int, block_size: int
) -> None:
    torch.manual_seed(max_blocks)
    sizes = [block_size] * num_groups
    index, tensors = torch.tensor(rows), state(num_groups, max_blocks, block_size)
    expected = decode_inputs(index, *tensors, sizes)
    there = [x.to(DEVICE) for x in (index, *tensors)]
    found = step_inputs_triton.gather(*there, sizes)
    for name in ("input_ids", "positions", "lengths", "indices"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), msg=name)
    check_metadata(found.attn, expected.attn, block_size)


def check_metadata(
    found: list[AttentionMetadata], expected: list[AttentionMetadata], block_size: int
) -> None:
    """Equal, but for 0 past each context; and of tensors of their own."""
    assert len(found) == len(expected)
    for of_found, of_torch in zip(found, expected, strict=True):
        column = torch.arange(of_torch.block_tables.shape[1])
        needed = column * block_size < of_torch.seq_lens[:, None]
        of_torch = of_torch._replace(block_tables=of_torch.block_tables * needed)
        assert of_found.max_row_tokens == of_torch.max_row_tokens
        of_found.row_bound.zero_(), of_torch.row_bound.zero_()  # only the length counts
        for name, wanted in of_torch._asdict().items():
            tensor = getattr(of_found, name)
            torch.testing.assert_close(tensor.cpu(), wanted, msg=name)
            assert tensor._base is None and tensor.storage_offset() == 0, name


Line = tuple[int, int, bool]  # tokens of a row, where they begin, whether the last was drawn


def mixed_step(lines: list[Line], padding: tuple[int, int], room: int) -> tuple[Tensor, Tensor]:
    """tokens and rows of a step, with so many tokens and rows of padding behind them."""
    rows = torch.randperm(REQUESTS)[: len(lines)].tolist()
    tokens, row_parts, end = [], [], 0
    for row, (count, place, last_is_drawn) in zip(rows, lines, strict=True):
        start, end = place % (room - count + 1), end + count
        ids = torch.randint(50000, (count,))
        if last_is_drawn:
            ids[-1] = -1
        tokens.append(torch.stack((torch.full_like(ids, row), start + torch.arange(count), ids)))
        row_parts.append((row, start + count, end))
    tokens.append(torch.tensor([REQUESTS, 0, 0])[:, None].expand(-1, padding[0]))
    row_parts += [(REQUESTS, 0, end)] * padding[1]
    return torch.cat(tokens, 1), torch.tensor(row_parts).T.contiguous()


@settings(max_examples=settings.default.max_examples // 4)  # slow in the interpreter
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 10**6), st.booleans()), max_size=REQUESTS
    ),
    st.tuples(st.integers(1, 150), st.integers(1, 4)) | st.just((0, 0)),
    st.sampled_from([1, 3]),
    st.sampled_from([4, 7, 2500]),
    st.sampled_from([16, 32]),
)
def test_inputs_with_prompts_are_those_of_torch(
    lines: list[Line], padding: tuple[int, int], num_groups: int, max_blocks: int, block_size: int
) -> None:
    """Prompts, chunks of them and single tokens; padding alone is what a capture runs on."""
    torch.manual_seed(max_blocks)
    last_token_ids, _, tables = state(num_groups, max_blocks, block_size)
    padding, sizes = padding if lines else (33, 2), [block_size] * num_groups
    tokens, rows = mixed_step(lines, padding, max_blocks * block_size)
    arguments = tokens, rows, last_token_ids, tables
    expected = mixed_inputs(*arguments, sizes)
    found = step_inputs_triton.unpack(*(x.to(DEVICE) for x in arguments), sizes)
    for name in ("input_ids", "positions"):
        tensor = getattr(found, name)
        torch.testing.assert_close(tensor.cpu(), getattr(expected, name), msg=name)
        assert tensor._base is None and tensor.storage_offset() == 0, name
    check_metadata(found.attn, expected.attn, block_size)


@pytest.mark.pairwise
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("max_blocks", [1, 7, 2500])
@pytest.mark.parametrize("rows", [[4], [REQUESTS], [8, 1, 2, 0, 3, 6, 5, 4, 7], [5, 6, 9, 9, 9]])
def test_ends_metadata_is_that_of_torch(rows: list[int], max_blocks: int, block_size: int) -> None:
    torch.manual_seed(max_blocks)
    _, computed, tables = state(2, max_blocks, block_size)
    index = torch.tensor(rows)
    arguments = index, computed[index] + 1, tables[1]
    expected = last_token_metadata(*arguments, block_size)
    found = step_inputs_triton.gather_last_tokens(*(x.to(DEVICE) for x in arguments), block_size)
    check_metadata([found], [expected], block_size)


@pytest.mark.parametrize("num_samples", [0, 1, 130])
@pytest.mark.parametrize("num_rows", [1, 5, 128, 300])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_rows_are_advanced_as_by_torch(num_rows: int, padding: int, num_samples: int) -> None:
    """Also where tokens are drawn for other rows, and for more or fewer, than the step has."""
    torch.manual_seed(num_rows)
    size = max(num_rows, num_samples) + 20

    def some_rows(count: int) -> Tensor:
        return torch.cat((torch.randperm(size)[:count], torch.full((padding,), size)))

    rows, sample_rows = some_rows(num_rows), some_rows(num_samples)
    lengths, drawn = (torch.randint(1, 999, x.shape) for x in (rows, sample_rows))
    drawn[::3] = -1
    before = torch.randint(1, 999, (2, size + 1))
    before[:, size] = 0
    expected = before.clone()
    advance(rows, lengths, sample_rows, drawn, *expected)
    found = before.to(DEVICE)
    arguments = (x.to(DEVICE) for x in (rows, lengths, sample_rows, drawn))
    step_inputs_triton.scatter(*arguments, *found)
    assert found[1, size] == 0
    torch.testing.assert_close(found[:, :size].cpu(), expected[:, :size])
