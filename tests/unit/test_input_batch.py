"""A step's metadata for each group of layers, from the rows' tables on the device."""

from __future__ import annotations

import pytest
import torch

from compiledllm.graphs.buckets import StepShape
from compiledllm.runner.input_batch import InputBatch, StepLayout
from compiledllm.runner.request_table import RequestTable
from compiledllm.types import ScheduledRequest, SchedulerOutput
from tests.support.requests import make_new_request

SIZE = 16
# Of each request, in each of three groups: 3, 2 and 1 blocks.
TABLES = [
    [[1, 2, 3], [0, 4, 5], [6, 7, 8]],
    [[11, 12], [13, 14], [0, 15]],
    [[21], [22], [23]],
]
COMPUTED = [34, 20, 5]


def table_of(num_groups: int) -> RequestTable:
    """Three requests in rows, the last of which has got its blocks one after another."""
    table = RequestTable(3, 5, 100, torch.device("cpu"), [1] * num_groups)
    new = [make_new_request(f"r{i}", [7] * 60) for i in range(3)]
    table.apply(
        SchedulerOutput(
            new,
            [
                ScheduledRequest(f"r{i}", COMPUTED[i], 1, [ids[:1] for ids in blocks], True)
                for i, blocks in enumerate(_of_groups(num_groups))
            ],
            [],
        )
    )
    rest = [[ids[1:] for ids in blocks] for blocks in _of_groups(num_groups)]
    lines = [
        ScheduledRequest(f"r{i}", COMPUTED[i], 1, ids if ids[0] else [], True)
        for i, ids in enumerate(rest)
    ]
    table.apply(SchedulerOutput([], lines, []))
    return table


def _of_groups(num_groups: int) -> list[list[list[int]]]:
    return [blocks[:num_groups] for blocks in TABLES]


def check(batch: InputBatch, num_groups: int, rows: list[int], positions: list[list[int]]) -> None:
    assert len(batch.attn) == num_groups
    for group, attn in enumerate(batch.attn):
        slots = [
            TABLES[row][group][position // SIZE] * SIZE + position % SIZE
            for row, seen in zip(rows, positions, strict=True)
            for position in seen
        ]
        assert attn.slot_mapping.tolist() == slots
        for index, row in enumerate(rows):
            ids = TABLES[row][group]
            assert attn.block_tables[index, : len(ids)].tolist() == ids
        assert not attn.block_tables[len(rows)].any()  # the empty row
        assert attn.seq_lens.tolist() == [*(seen[-1] + 1 for seen in positions), 0]
        for tensor in (attn.slot_mapping, attn.block_tables):
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 16 == 0, "compiled code would copy it"


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_decode_steps_read_each_groups_table(num_groups: int, rows: list[int]) -> None:
    table = table_of(num_groups)
    batch = InputBatch.decode(torch.tensor(rows), table, [SIZE] * num_groups)
    check(batch, num_groups, rows, [[COMPUTED[row]] for row in rows])


@pytest.mark.parametrize("samples", [True, False])
def test_a_step_of_one_token_each_is_a_decode_step_if_all_sample(samples: bool) -> None:
    table = table_of(1)
    lines = [ScheduledRequest(f"r{i}", COMPUTED[i], 1, [], samples) for i in (2, 0)]
    layout = StepLayout.of(SchedulerOutput([], lines, []), table)
    assert layout.shape == StepShape(2, 2, max_row_tokens=int(samples))
    if samples:
        inputs = layout.inputs(table, StepShape(4, 4, max_row_tokens=1))
        assert inputs.tolist() == [2, 0, table.padding_row, table.padding_row]
    inputs = torch.from_numpy(layout.inputs(table, layout.shape))
    batch = InputBatch.of(layout.shape, inputs, 2, table, [SIZE])
    check(batch, 1, [2, 0], [[COMPUTED[2]], [COMPUTED[0]]])
    assert batch.num_computed_tokens.tolist() == [COMPUTED[2] + 1, COMPUTED[0] + 1]


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("counts", [[1, 1, 1], [14, 1, 3], [3, 12, 2]])
def test_steps_with_prompts_read_each_groups_table(num_groups: int, counts: list[int]) -> None:
    table = table_of(num_groups)
    lines = [ScheduledRequest(f"r{i}", COMPUTED[i], n, [], True) for i, n in enumerate(counts)]
    layout = StepLayout.of(SchedulerOutput([], lines, []), table)
    packed = torch.from_numpy(layout.pack(table, layout.shape))
    batch = InputBatch.unpack(packed, layout.shape, 3, table, [SIZE] * num_groups)
    positions = [list(range(COMPUTED[i], COMPUTED[i] + n)) for i, n in enumerate(counts)]
    check(batch, num_groups, [0, 1, 2], positions)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_padded_steps_and_their_ends_read_the_null_block(num_groups: int) -> None:
    table = table_of(num_groups)
    lines = [
        ScheduledRequest("r0", COMPUTED[0], 9, [], False),
        ScheduledRequest("r2", COMPUTED[2], 2, [], True),
    ]
    layout = StepLayout.of(SchedulerOutput([], lines, []), table)
    shape = StepShape(16, 4, max_row_tokens=0)
    packed, sizes = torch.from_numpy(layout.pack(table, shape)), [SIZE] * num_groups
    batch = InputBatch.unpack(packed, shape, 4, table, sizes)
    assert batch.input_ids.tolist() == [7] * 11 + [0] * 5
    assert batch.positions.tolist() == [*range(34, 43), 5, 6] + [0] * 5
    for attn in batch.attn:
        assert attn.slot_mapping[11:].tolist() == [-1] * 5
        assert attn.seq_lens.tolist() == [43, 7, 0, 0, 0]
        assert attn.query_start_loc.tolist() == [0, 9, 11, 11, 11, 11]
        assert not attn.block_tables[2:].any()
    indices, (attn,) = batch.sampled_tokens(table, [num_groups - 1], sizes)
    assert indices.tolist() == [10, 0, 0, 0]
    assert attn.slot_mapping.tolist() == [-1] * 4
    assert attn.seq_lens.tolist() == [7, 1, 1, 1, 0]  # of padding not 0: it would attend to nothing
    assert attn.query_start_loc.tolist() == [0, 1, 2, 3, 4, 4]
    assert attn.block_tables[0, :1].tolist() == TABLES[2][num_groups - 1]
    assert not attn.block_tables[1:].any()


@pytest.mark.parametrize("num_groups", [1, 3])
def test_padding_stays_in_the_null_block(num_groups: int) -> None:
    table = table_of(num_groups)
    batch = InputBatch.dummy(7, table, num_samples=4)
    assert batch.sample_rows.tolist() == [table.padding_row] * 4
    assert batch.rows.tolist() == [table.padding_row] and len(batch.logits_indices) == 4
    assert len(batch.attn) == num_groups
    for attn in batch.attn:
        assert (attn.slot_mapping == -1).all() and not attn.block_tables.any()
        assert attn.slot_mapping.is_contiguous() and attn.block_tables.is_contiguous()


def test_tables_of_a_split_group_take_turns() -> None:
    """Its blocks hold half the tokens, so that two tables have the blocks of one."""
    table = RequestTable(2, 3, 100, torch.device("cpu"), splits=[2, 1])
    blocks = [[1, 2], [3, 4], [5, 6]]  # of 16 tokens: two tables, then one of 32 tokens
    for row, computed in (("r0", 0), ("r1", 47)):
        new = [make_new_request(row, [7] * 60)]
        line = ScheduledRequest(row, computed, 1, [ids[:1] for ids in blocks], True)
        table.apply(SchedulerOutput(new, [line], []))
    line = ScheduledRequest("r1", 47, 1, [ids[1:] for ids in blocks], True)
    table.apply(SchedulerOutput([], [line], []))
    batch = InputBatch.decode(torch.tensor([1, 0]), table, [16, 32])
    halves, whole = (attn.block_tables.tolist() for attn in batch.attn)
    assert halves == [[1, 3, 2, 4, 0, 0], [1, 3, 0, 0, 0, 0], [0] * 6]
    assert whole == [[5, 6, 0], [5, 0, 0], [0] * 3]
    slots = [attn.slot_mapping.tolist() for attn in batch.attn]
    assert slots == [[2 * 16 + 15, 16], [6 * 32 + 15, 5 * 32]]
    sampled = batch.sampled_tokens(table, [0, 1, 0], [16, 32])
    assert [attn.block_tables.shape[1] for attn in sampled.attn] == [6, 3, 6]
