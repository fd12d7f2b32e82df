"""Every attention backend against a naive float64 reference, one token and one head at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm.kernels.attention import (
    kv_cache_shape,
    make_backend,
    paged_attention,
    store_kv,
)
from compiledllm.kernels.backend import AttentionMetadata, ScoreOptions, make_row_bound

BACKENDS = ["torch", "triton", "fixed_order"]
CUDA = torch.cuda.is_available()
# Triton's interpreter cannot multiply bfloat16, and is slow: it gets a part of the grid here, and
# the whole one on a GPU (test_paged_attention_gpu.py).
HALF = dict.fromkeys(BACKENDS, torch.bfloat16 if CUDA else torch.float16)
HALF["torch"] = torch.bfloat16
HEADS = {"mha": (3, 3), "gqa": (6, 2), "mqa": (4, 1)}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
GARBAGE = 30.0  # finite, and large enough to be seen wherever it leaks in

# (query length, context length including the query) per row.
Rows = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    rows: Rows
    head_dim: int = 64
    heads: str = "gqa"
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    sliding_window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    max_row_tokens: int = 0  # as the metadata says; 0: any number
    in_chunks: bool = False
    num_unused_columns: int = 2  # of the block table, zeros behind each row's blocks


@dataclass
class Step:
    """Inputs of one attention call, and what each row's tokens really are."""

    query: Tensor  # [tokens, num_heads, head_dim]
    kv_cache: Tensor
    attn: AttentionMetadata
    keys: list[Tensor] = field(default_factory=list)  # per row [context, num_kv_heads, head_dim]
    values: list[Tensor] = field(default_factory=list)
    sinks: Tensor | None = None  # [num_heads]


def make_step(case: Case, backend: str = "torch", seed: int = 0) -> Step:
    """Random rows in a cache of garbage, their blocks scattered over it, stored by `store_kv`.

    On a CPU by torch's, as the tests of storing below are enough for the slow interpreter.
    """
    torch.manual_seed(seed)
    store_there = make_backend(backend if CUDA else "torch")
    num_heads, num_kv_heads = HEADS[case.heads]
    size, dtype = case.block_size, case.dtype
    blocks_per_row = [-(-context // size) for _, context in case.rows]
    num_blocks = sum(blocks_per_row) + 4
    shape = kv_cache_shape(num_blocks, size, num_kv_heads, case.head_dim)
    kv_cache = torch.where(torch.rand(shape) < 0.5, GARBAGE, -GARBAGE).to(dtype)
    shuffled = (torch.randperm(num_blocks - 1) + 1).tolist()
    width = max(blocks_per_row, default=0) + case.num_unused_columns
    block_tables = torch.zeros(len(case.rows), width, dtype=torch.int32)
    keys, values = [], []
    for row, (_, context) in enumerate(case.rows):
        ids = [shuffled.pop() for _ in range(blocks_per_row[row])]
        block_tables[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        keys.append(torch.randn(context, num_kv_heads, case.head_dim).to(dtype))
        values.append(torch.randn(context, num_kv_heads, case.head_dim).to(dtype))
        positions = torch.arange(context)
        slots = block_tables[row].long()[positions // size] * size + positions % size
        store_kv(keys[-1], values[-1], kv_cache, slots, store_there)
    query_lengths = torch.tensor([length for length, _ in case.rows])
    attn = AttentionMetadata(
        slot_mapping=torch.full((int(query_lengths.sum()),), -1),
        block_tables=block_tables,
        seq_lens=torch.tensor([context for _, context in case.rows], dtype=torch.int32),
        query_start_loc=torch.cat((torch.zeros(1), query_lengths.cumsum(0))).int(),
        row_bound=make_row_bound(case.max_row_tokens),
    )
    query = torch.randn(int(query_lengths.sum()), num_heads, case.head_dim).to(dtype)
    sinks = (torch.randn(num_heads) * 3).to(dtype) if case.has_sinks else None
    return Step(query, kv_cache, attn, keys, values, sinks)


def scale_of(case: Case) -> float:
    return case.head_dim**-0.5 if case.scale is None else case.scale


def reference(case: Case, step: Step) -> Tensor:
    """softmax(q k^T scale) v in float64 for each token and head by itself."""
    num_heads, num_kv_heads = HEADS[case.heads]
    outputs: list[Tensor] = []
    token = 0
    for row, (length, context) in enumerate(case.rows):
        for position in range(context - length, context):
            first = max(0, position + 1 - case.sliding_window) if case.sliding_window else 0
            if case.in_chunks:
                first = position - position % case.sliding_window
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                q = step.query[token, head].double()
                k = step.keys[row][first : position + 1, kv_head].double()
                v = step.values[row][first : position + 1, kv_head].double()
                scores = k @ q * scale_of(case)
                if case.soft_cap:
                    scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
                if step.sinks is not None:
                    scores = torch.cat((scores, step.sinks[head, None].double()))
                outputs.append(scores.softmax(0)[: len(v)] @ v)
            token += 1
    if not outputs:
        return torch.empty(step.query.shape, dtype=torch.float64)
    return torch.stack(outputs).view(step.query.shape)


def run(case: Case, step: Step, backend: str) -> Tensor:
    options = ScoreOptions(scale_of(case), case.sliding_window, case.soft_cap, step.sinks)
    options = options._replace(in_chunks=case.in_chunks)
    return paged_attention(step.query, step.kv_cache, step.attn, options, make_backend(backend))


def check(case: Case, backend: str) -> None:
    step = make_step(case, backend)
    before = step.kv_cache.clone()
    out = run(case, step, backend)
    assert out.dtype == case.dtype
    assert out.shape == step.query.shape
    assert out.is_contiguous()  # as the fake implementation promises the compiler
    assert torch.equal(step.kv_cache, before)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), reference(case, step), atol=tolerance, rtol=tolerance)


def edges(size: int) -> list[int]:
    """Context lengths around a block's border, and a long one."""
    return [1, size - 1, size, size + 1, 5 * size + 3]


def decode_rows(size: int) -> Rows:
    return [(1, context) for context in edges(size)]


def prefill_rows(size: int) -> Rows:
    """Whole prompts and chunks that continue after computed tokens."""
    whole = [(context, context) for context in edges(size)]
    return [*whole, (2, size + 1), (5, 3 * size), (size, 2 * size)]


def mixed_rows(size: int) -> Rows:
    """A prefill before, between and after decodes, and padding rows: no tokens, length 0."""
    return [(7, 7), (1, size), (1, 1), (3, 2 * size + 1), (0, 0), (1, 3 * size), (0, 0)]


def few_rows(size: int) -> Rows:
    """Rows of one to eight tokens and a padding row, as when drafted tokens are verified."""
    return [(5, 5), (1, 2 * size + 1), (3, size + 1), (0, 0), (8, 5 * size + 3)]


ROWS = {"decode": decode_rows, "prefill": prefill_rows, "mixed": mixed_rows, "few": few_rows}
MAX_ROW_TOKENS = {"decode": 1, "prefill": 0, "mixed": 0, "few": 8}
# Two blocks at most: for what does not depend on how long the contexts are.
SHORT_ROWS: dict[str, Rows] = {
    "decode": [(1, 17), (1, 3)],
    "prefill": [(17, 17), (5, 20)],
    "mixed": [(3, 18), (1, 17), (0, 0), (1, 2)],
    "few": [(3, 18), (1, 17), (0, 0), (2, 2)],
}


def case_of(rows: str, size: int = 16, **options: Any) -> Case:
    """Rows of a kind, with blocks of `size` tokens, as a step of this kind has them."""
    return Case(ROWS[rows](size), block_size=size, max_row_tokens=MAX_ROW_TOKENS[rows], **options)


def short_case_of(rows: str, **options: Any) -> Case:
    return Case(SHORT_ROWS[rows], max_row_tokens=MAX_ROW_TOKENS[rows], **options)


pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def where_the_backend_runs(backend: str) -> Iterator[None]:
    """Triton on a GPU if there is one, else in its interpreter (tests/conftest.py)."""
    torch.set_default_device("cuda" if backend != "torch" and CUDA else "cpu")
    yield
    torch.set_default_device("cpu")


# -- the values -----------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_equals_the_naive_reference(
    head_dim: int, heads: str, block_size: int, rows: str, half: bool, backend: str
) -> None:
    dtype = HALF[backend] if half else torch.float32
    case = case_of(rows, block_size, head_dim=head_dim, heads=heads, dtype=dtype)
    if backend != "torch" and block_size != 16:  # one length of each kind is enough here
        case = replace(case, rows=case.rows[-2:])
    check(case, backend)


@pytest.mark.parametrize("rows", ["decode", "mixed"])
def test_heads_may_have_512_dimensions(rows: str, backend: str) -> None:
    check(short_case_of(rows, head_dim=512, dtype=HALF[backend], scale=1 / 512), backend)


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sliding_window", [1, 5, 16, 17, 1000])
def test_sliding_window_sees_the_latest_positions_only(
    sliding_window: int, heads: str, rows: str, backend: str
) -> None:
    check(case_of(rows, heads=heads, sliding_window=sliding_window), backend)


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sliding_window", [0, 9])
def test_soft_cap_bends_the_scores(
    sliding_window: int, heads: str, rows: str, backend: str
) -> None:
    case = case_of(rows, heads=heads, soft_cap=1.5, sliding_window=sliding_window)
    check(case, backend)


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sliding_window", [0, 9])
def test_sinks_take_their_share_of_the_weights(
    sliding_window: int, heads: str, rows: str, backend: str
) -> None:
    case = case_of(rows, heads=heads, sliding_window=sliding_window, has_sinks=True)
    check(case, backend)
    short = replace(case, rows=SHORT_ROWS[rows], head_dim=80, dtype=HALF[backend])
    check(replace(short, soft_cap=1.5), backend)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_a_sink_may_take_nothing_or_all(logit: float, backend: str) -> None:
    case = Case(mixed_rows(16), has_sinks=True)
    step = make_step(case, backend)
    assert step.sinks is not None
    step.sinks.fill_(logit)
    without = run(case, replace(step, sinks=None), backend)
    expected = without if logit < 0 else torch.zeros_like(without)
    torch.testing.assert_close(run(case, step, backend), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("half", [False, True])
def test_scale_is_the_one_given(rows: str, half: bool, backend: str) -> None:
    dtype = HALF[backend] if half else torch.float32
    check(short_case_of(rows, scale=0.31, dtype=dtype), backend)
    check(short_case_of(rows, scale=0.31, soft_cap=3.0, dtype=dtype), backend)


@pytest.mark.parametrize("length", [1, 2])
def test_single_row(length: int, backend: str) -> None:
    check(Case([(length, 33)]), backend)
    check(Case([(length, length)]), backend)


def test_rows_of_equal_length(backend: str) -> None:
    check(Case([(1, 20)] * 4), backend)
    check(Case([(20, 20)] * 2), backend)


def test_padding_rows_between_decodes_change_nothing(backend: str) -> None:
    case = Case([(1, 20), (0, 0), (1, 5), (0, 0), (0, 0), (1, 17)])
    check(case, backend)
    padded = make_step(case, backend)
    keep = torch.tensor([0, 2, 5])
    attn = AttentionMetadata(
        padded.attn.slot_mapping,
        padded.attn.block_tables[keep],
        padded.attn.seq_lens[keep],
        torch.arange(4, dtype=torch.int32),
    )
    without = Step(padded.query, padded.kv_cache, attn)
    assert torch.equal(run(case, padded, backend), run(case, without, backend))


@pytest.mark.parametrize("rows", [[(1, 20), (4, 9)], [(1, 20), (1, 9)], [(4, 9)]], ids=str)
def test_tokens_behind_the_last_row_leave_the_others_alone(rows: Rows, backend: str) -> None:
    case = Case(rows)
    step = make_step(case, backend)
    expected = run(case, step, backend)
    step.query = torch.cat((step.query, torch.full((3, *step.query.shape[1:]), GARBAGE)))
    out = run(case, step, backend)
    assert out.shape == step.query.shape
    assert torch.equal(out[:-3], expected)


def test_query_may_be_a_slice_of_a_wider_tensor(backend: str) -> None:
    """As the model's: queries, keys and values come out of one product."""
    for rows in (mixed_rows(16), [(1, 20), (1, 3)], [(1, 17)], [(6, 20)]):
        case = Case(rows)
        step = make_step(case, backend)
        expected = run(case, step, backend)
        wide = torch.randn(len(step.query), step.query.shape[1] + 4, case.head_dim)
        wide[:, : step.query.shape[1]] = step.query
        step.query = wide[:, : step.query.shape[1]]
        out = run(case, step, backend)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_nothing_of_unused_slots_and_blocks_leaks_in(rows: str, backend: str) -> None:
    case = case_of(rows)
    step = make_step(case, backend)
    expected = run(case, step, backend)
    used = torch.zeros(step.kv_cache.shape[1:3], dtype=torch.bool)
    for row, (_, context) in enumerate(case.rows):
        for position in range(context):
            used[step.attn.block_tables[row, position // 16], position % 16] = True
    step.kv_cache[:, ~used] = 1e6
    assert torch.equal(run(case, step, backend), expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 48, 1000])
def test_in_chunks_a_token_sees_its_chunk_only(
    chunk: int, heads: str, rows: str, backend: str
) -> None:
    if not make_backend(backend).takes_chunks:
        pytest.skip("the backend refuses such layers")
    check(case_of(rows, heads=heads, sliding_window=chunk, in_chunks=True), backend)


@pytest.mark.parametrize("window", [1, 16, 33])
def test_blocks_left_of_the_window_are_not_read(window: int, backend: str) -> None:
    """They belong to others by then, and may hold NaN, which a weight of zero leaves NaN."""
    case = Case([*mixed_rows(16), (1, 150), (20, 130)], sliding_window=window)
    step = make_step(case, backend)
    expected = run(case, step, backend)
    (poison, *_) = set(range(1, step.kv_cache.shape[1])) - set(
        step.attn.block_tables.view(-1).tolist()
    )
    step.kv_cache[:, poison] = float("nan")
    for row, (length, context) in enumerate(case.rows):
        step.attn.block_tables[row, : max(context - length - window + 1, 0) // 16] = poison
    assert (step.attn.block_tables == poison).any()
    assert torch.equal(run(case, step, backend), expected)


def test_extra_columns_of_the_block_table_change_nothing(backend: str) -> None:
    for rows in ROWS:
        narrow = make_step(case_of(rows, num_unused_columns=0), backend)
        wide = make_step(case_of(rows, num_unused_columns=9), backend)
        outs = [run(case_of(rows), step, backend) for step in (narrow, wide)]
        assert torch.equal(*outs)


def test_row_gives_the_same_alone_and_in_a_crowd(backend: str) -> None:
    case = Case(mixed_rows(16))
    step = make_step(case, backend)
    together = run(case, step, backend)
    starts = step.attn.query_start_loc.tolist()
    for row, (length, _) in enumerate(case.rows):
        if length:
            start, end = starts[row], starts[row + 1]
            attn = AttentionMetadata(
                step.attn.slot_mapping[start:end],
                step.attn.block_tables[[row]],
                step.attn.seq_lens[[row]],
                torch.tensor([0, length], dtype=torch.int32),
            )
            alone = run(case, Step(step.query[start:end], step.kv_cache, attn), backend)
            torch.testing.assert_close(together[start:end], alone, atol=1e-5, rtol=1e-5)


# -- storing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_keys_and_values_land_in_their_slots_and_nowhere_else(
    dtype: torch.dtype, backend: str
) -> None:
    kv_cache = torch.full(kv_cache_shape(5, 16, 2, 8), GARBAGE, dtype=dtype)
    key, value = torch.randn(2, 6, 2, 8).to(dtype)
    slots = torch.tensor([79, 16, 40, 41, 17, 63])
    store_kv(key, value, kv_cache, slots, make_backend(backend))
    expected = torch.full((2, 5 * 16, 2, 8), GARBAGE, dtype=dtype)
    for token, slot in enumerate(slots.tolist()):
        expected[0, slot], expected[1, slot] = key[token], value[token]
    assert torch.equal(kv_cache.view(2, -1, 2, 8), expected)


def test_slot_minus_one_touches_the_null_block_only(backend: str) -> None:
    kv_cache = torch.zeros(kv_cache_shape(4, 16, 2, 8))
    key, value = torch.randn(2, 5, 2, 8)
    store_kv(key, value, kv_cache, torch.tensor([-1, 33, -1, -1, 20]), make_backend(backend))
    slots = kv_cache.view(2, -1, 2, 8)
    assert torch.equal(slots[:, 33], torch.stack((key[1], value[1])))
    assert torch.equal(slots[:, 20], torch.stack((key[4], value[4])))
    written = slots.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
    assert set(written) - {20, 33} <= set(range(16))
    if backend == "torch":  # it reads the null block, under masks, which do not hold NaN back
        assert set(written) == {20, 33}


def test_keys_and_values_may_be_slices_of_a_wider_tensor(backend: str) -> None:
    wide = torch.randn(4, 6, 8)
    slots = torch.tensor([16, 17, 34, 18])
    caches = [torch.zeros(kv_cache_shape(3, 16, 2, 8)) for _ in range(2)]
    store_kv(wide[:, 2:4], wide[:, 4:], caches[0], slots, make_backend(backend))
    store_kv(
        wide[:, 2:4].contiguous(), wide[:, 4:].contiguous(), caches[1], slots, make_backend(backend)
    )
    assert torch.equal(*caches)


# -- as operators of the compiler -----------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(0.0, False), (5.0, False), (0.0, True)])
def test_paged_attention_is_a_sound_operator(
    rows: str, soft_cap: float, has_sinks: bool, backend: str
) -> None:
    case = short_case_of(rows, has_sinks=has_sinks)
    step = make_step(case, backend)
    options = ScoreOptions(0.125, 0, soft_cap, step.sinks)
    arguments = (step.query, step.kv_cache, *step.attn, *options, backend)
    check_operator(torch.ops.compiledllm.paged_attention.default, arguments)


def test_store_kv_is_a_sound_operator(backend: str) -> None:
    key, value = torch.randn(2, 3, 2, 8)
    kv_cache = torch.zeros(kv_cache_shape(4, 16, 2, 8))
    arguments = (key, value, kv_cache, torch.tensor([16, 40, 63]), backend)
    check_operator(torch.ops.compiledllm.store_kv.default, arguments)


def check_operator(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, fake implementation and tracing agree with what the operator does."""
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_step_stores_before_it_reads(backend: str) -> None:
    """The compiler must keep the order of the two operators through the cache they share."""
    case = Case([(4, 4)])
    step = make_step(case, backend)
    key, value = torch.randn(2, *step.keys[0].shape)
    blocks = step.attn.block_tables[0, 0].long()
    attn = step.attn._replace(slot_mapping=blocks * 16 + torch.arange(4))

    options, there = ScoreOptions(scale_of(case)), make_backend(backend)

    def forward(query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        store_kv(key, value, kv_cache, attn.slot_mapping, there)
        return paged_attention(query + 0.0, kv_cache, attn, options, there) * 1.0

    caches = [step.kv_cache.clone() for _ in range(2)]
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    out = compiled(step.query, key, value, caches[0])
    torch.testing.assert_close(out, forward(step.query, key, value, caches[1]))
    assert torch.equal(*caches)
    stored = Step(step.query, caches[0], attn, [key], [value])
    torch.testing.assert_close(out.double(), reference(case, stored), atol=1e-5, rtol=1e-5)
