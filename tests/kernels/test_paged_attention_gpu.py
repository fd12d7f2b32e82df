"""The Triton kernels on a GPU against the torch backend: the whole grid, and captured calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import paged_attention_torch as oracle
from compiledllm.kernels import prefill_attention_cuda
from compiledllm.kernels.backend import FP8, AttentionMetadata, ScoreOptions, make_row_bound
from compiledllm.kernels.decode_attention_triton import MAX_TOGETHER
from compiledllm.kernels.paged_attention_triton import paged_attention
from compiledllm.kernels.prefill_attention_triton import prefill_tiling

pytestmark = pytest.mark.gpu

HEADS = {"mha": (4, 4), "gqa": (8, 2), "gqa7": (14, 2), "mqa": (8, 1)}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Step = tuple[Tensor, Tensor, AttentionMetadata]  # as paged_attention takes it
FORM = ScoreOptions(0.1)


def lengths(size: int) -> list[int]:
    return [1, size - 1, size, size + 1, 333, 2049]


ROWS = {
    "decode": [(1, n) for n in lengths(16)] + [(0, 0)],
    "prefill": [(n, n) for n in lengths(16)] + [(2, 17), (130, 700), (0, 0)],
    "few": [(8, 8), (1, 900), (5, 17), (8, 2049), (0, 0), (3, 333), (2, 2), (0, 0)],
    "mixed": [(70, 70), (1, 900), (1, 1), (300, 1000), (0, 0), (1, 47), (0, 0)],
}


def make_step(
    rows: list[tuple[int, int]], head_dim: int, heads: str, block_size: int, dtype: torch.dtype
) -> Step:
    """Random queries over a cache whose unused slots hold NaN.

    Rows of at most `MAX_TOGETHER` tokens are computed together, by the decode kernel.
    """
    num_heads, num_kv_heads = HEADS[heads]
    widths = [-(-context // block_size) for _, context in rows]
    total = sum(widths) + 3
    shape = (2, total, block_size, num_kv_heads, head_dim)
    kv_cache = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    free = (torch.randperm(total - 1) + 1).tolist()
    tables = torch.zeros(len(rows), max(widths) + 2, dtype=torch.int32)
    for row, (_, context) in enumerate(rows):
        ids = [free.pop() for _ in range(widths[row])]
        tables[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        at = torch.arange(context)
        slots = tables[row].long()[at // block_size] * block_size + at % block_size
        flat = kv_cache.view(2, -1, num_kv_heads, head_dim)
        flat[:, slots.cuda()] = torch.randn(
            2, context, num_kv_heads, head_dim, dtype=dtype, device="cuda"
        )
    counts = torch.tensor([count for count, _ in rows])
    most = int(counts.max())
    bound = make_row_bound(most if most <= MAX_TOGETHER else 0, torch.device("cuda"))
    query = torch.randn(int(counts.sum()), num_heads, head_dim, dtype=dtype, device="cuda")
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int().cuda()
    seq_lens = torch.tensor([context for _, context in rows], dtype=torch.int32).cuda()
    slots = torch.full((len(query),), -1).cuda()
    return query, kv_cache, AttentionMetadata(slots, tables.cuda(), seq_lens, starts, bound)


def assert_equals_oracle(
    step: Step,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    query, kv_cache, attn = step
    options = ScoreOptions(scale, window, soft_cap, sinks)
    out = paged_attention(*step, options)
    wide = kv_cache.float().nan_to_num(0.0)  # the oracle multiplies masked slots by zero
    expected = oracle.paged_attention(query.float(), wide, attn, options)
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_the_grid(head_dim: int, heads: str, rows: str, dtype: torch.dtype) -> None:
    for block_size in (16, 32, 64):
        step = make_step(ROWS[rows], head_dim, heads, block_size, dtype)
        assert_equals_oracle(step, head_dim**-0.5)
    assert_equals_oracle(step, 0.3, window=33)
    assert_equals_oracle(step, 0.3, soft_cap=5.0)
    assert_equals_oracle(step, 0.3, window=500, soft_cap=5.0)
    sinks = torch.randn(step[0].shape[1], dtype=dtype, device="cuda")
    assert_equals_oracle(step, 0.3, sinks=sinks)
    assert_equals_oracle(step, 0.3, window=33, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_many_queries_in_larger_programs(head_dim: int, heads: str, dtype: torch.dtype) -> None:
    rows = [(5000, 5000), (4000, 6000), (1, 300), (4001, 4001), (70, 70)]
    step = make_step(rows, head_dim, heads, 16, dtype)
    num_heads, num_kv_heads = HEADS[heads]
    num_queries = step[0].shape[0] * num_heads
    tiling = prefill_tiling(head_dim, num_heads // num_kv_heads, dtype, num_queries)
    assert tiling.rows >= 128
    query, kv_cache, attn = step
    for each in (step, (query, kv_cache.to(FP8), attn)):
        assert_equals_oracle(each, head_dim**-0.5)
        assert_equals_oracle(each, 0.3, window=700, soft_cap=5.0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_few_queries_on_a_long_context(head_dim: int, heads: str) -> None:
    """On Hopper, blocks of a cluster share the context."""
    for rows in ([(16, 30_000)], [(9, 9000), (1, 300), (40, 700)], [(200, 5000)], [(9, 900)] * 40):
        step = make_step(rows, head_dim, heads, 16, torch.bfloat16)
        assert_equals_oracle(step, head_dim**-0.5)
        sinks = torch.randn(step[0].shape[1], dtype=torch.bfloat16, device="cuda")
        assert_equals_oracle(step, 0.3, window=2000, soft_cap=5.0, sinks=sinks)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_pieces_of_prompts_than_thread_blocks(head_dim: int, heads: str) -> None:
    """On Hopper, a block computes several pieces, as most rows have partial pieces only."""
    rows = [(9 + n % 5, 40 + 23 * n) for n in range(100)] + [(1, 70), (170, 333), (1, 9), (0, 0)]
    step = make_step(rows, head_dim, heads, 16, torch.bfloat16)
    assert_equals_oracle(step, head_dim**-0.5)
    assert_equals_oracle(step, 0.3, window=300)
    first = paged_attention(*step, FORM)
    for _ in range(20):
        assert torch.equal(paged_attention(*step, FORM), first)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_prompts_on_an_fp8_cache_equal_those_on_the_dequantised_cache(
    head_dim: int, heads: str
) -> None:
    """On Hopper, some warps of a block convert the cache for the others."""
    scales = torch.tensor([0.5, 2.0], device="cuda")
    for block_size, rows in itertools.product(
        (8, 16, 64), ([(16, 30_000)], [(9 + n, 40 + 50 * n) for n in range(100)])
    ):
        query, kv_cache, attn = make_step(rows, head_dim, heads, block_size, torch.bfloat16)
        packed = kv_cache.to(FP8)
        wide = (packed.float() * scales.view(2, 1, 1, 1, 1)).bfloat16()
        expected = paged_attention(query, wide, attn, FORM)
        for _ in range(20):
            out = paged_attention(query, packed, attn, FORM._replace(kv_scales=scales))
            assert torch.equal(out, expected)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="needs compute capability 9.0",
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_hopper_has_a_kernel_of_its_own_for_prompts(head_dim: int) -> None:
    """A kernel that does not compile is replaced by Triton's, with a warning only."""
    query, kv_cache, _ = make_step([(300, 300)], head_dim, "gqa", 16, torch.bfloat16)
    for cache in (kv_cache, kv_cache.to(FP8)):
        assert prefill_attention_cuda.kernel_for(query, cache, FORM) is not None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equal_inputs_give_equal_bits(dtype: torch.dtype) -> None:
    for rows in ROWS.values():
        step = make_step(rows, 128, "gqa", 16, dtype)
        first = paged_attention(*step, FORM)
        for _ in range(20):
            assert torch.equal(paged_attention(*step, FORM), first)


@pytest.mark.parametrize(("batch", "heads"), itertools.product((1, 7, 64), ("gqa", "mha")))
def test_a_captured_decode_serves_every_length(batch: int, heads: str) -> None:
    longest = [(1, 2000)] * batch + [(0, 0)]
    step = make_step(longest, 128, heads, 16, torch.bfloat16)
    query, kv_cache, attn = step
    kv_cache.nan_to_num_(0.0)
    paged_attention(*step, FORM)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*step, FORM)
    for _ in range(10):
        attn.seq_lens[:batch] = torch.randint(1, 2001, (batch,), dtype=torch.int32, device="cuda")
        query.normal_()
        graph.replay()
        replayed = out.clone()
        out.fill_(float("nan"))
        assert torch.equal(replayed, paged_attention(*step, FORM))
        assert_equals_oracle(step, 0.1)
