"""Triton's inputs of a decode step, and its update of the rows, against the torch ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import step_inputs_triton
from compiledllm.kernels.step_inputs import advance, decode_inputs

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


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("max_blocks", [1, 7, 1024, 2500])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("rows", [[4], [REQUESTS], [8, 1, 2, 0, 3, 6, 5, 4, 7], [5, 6, 9, 9, 9]])
def test_inputs_are_those_of_torch(
    rows: list[int], num_groups: int, max_blocks: int, block_size: int
) -> None:
    torch.manual_seed(max_blocks)
    index, tensors = torch.tensor(rows), state(num_groups, max_blocks, block_size)
    expected = decode_inputs(index, *tensors, block_size)
    there = [x.to(DEVICE) for x in (index, *tensors)]
    found = step_inputs_triton.gather(*there, block_size)
    for name in ("input_ids", "positions", "lengths", "indices"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), msg=name)
    assert len(found.attn) == num_groups
    for of_found, of_torch in zip(found.attn, expected.attn, strict=True):
        needed = torch.arange(max_blocks) * block_size < of_torch.seq_lens[:, None]
        of_torch = of_torch._replace(block_tables=of_torch.block_tables * needed)
        for name, wanted in of_torch._asdict().items():
            tensor = getattr(of_found, name)
            torch.testing.assert_close(tensor.cpu(), wanted, msg=name)
            assert tensor._base is None and tensor.storage_offset() == 0, name


@pytest.mark.parametrize("num_rows", [1, 5, 128, 300])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_rows_are_advanced_as_by_torch(num_rows: int, padding: int) -> None:
    """Also where other rows are drawn for than have tokens in the step, as in one with prompts."""
    torch.manual_seed(num_rows)
    size = num_rows + 20

    def some_rows() -> Tensor:
        return torch.cat((torch.randperm(size)[:num_rows], torch.full((padding,), size)))

    rows, sample_rows = some_rows(), some_rows()
    lengths, drawn = torch.randint(1, 999, (2, len(rows)))
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
