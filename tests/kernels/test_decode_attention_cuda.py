"""The CUDA kernel of decode rows' attention against the torch backend, compiled for a CPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import counters, cuda_kernel, decode_attention_cuda
from compiledllm.kernels import paged_attention_torch as oracle
from compiledllm.kernels.backend import FP8, AttentionMetadata, ScoreOptions, make_row_bound
from tests.kernels.test_prefill_attention_cuda import STALE, make_step
from tests.support.cuda_on_cpu import CpuKernel

NUM_BLOCKS = 64


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(cuda_kernel, "CudaKernel", CpuKernel)
    monkeypatch.setattr(CpuKernel, "seed", 3)  # threads take turns in random orders
    monkeypatch.setattr(decode_attention_cuda, "is_hopper", lambda: True)
    monkeypatch.setattr(decode_attention_cuda, "num_multiprocessors", lambda: NUM_BLOCKS)
    decode_attention_cuda._kernel.cache_clear()


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "block_size", "dtype", "options"),
    [
        ([1], (4, 4), 64, 16, torch.bfloat16, {}),
        ([3000], (8, 2), 128, 16, torch.bfloat16, {}),
        ([300, 17, 1, 900], (10, 2), 128, 32, torch.float16, {"soft_cap": 3.0}),
        ([16, 128, 0, 129, 2000, 5, 700, 33], (9, 3), 64, 16, torch.bfloat16, {"window": 100}),
        ([500, 40], (16, 2), 96, 64, torch.bfloat16, {"sinks": True}),
        ([260] * 3, (4, 1), 32, 16, torch.float16, {"sinks": True, "window": 256}),
        ([700, 3], (16, 2), 256, 16, torch.bfloat16, {"soft_cap": 20.0}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_rows_equal_those_of_the_torch_backend(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    options: dict[str, float | bool],
) -> None:
    torch.manual_seed(len(lengths))
    rows = [(1, max(length, 1)) for length in lengths]
    query, kv_cache, attn = make_step([*rows, (0, 0)], heads, head_dim, block_size, dtype)
    attn.seq_lens.copy_(torch.tensor([*lengths, 0]))
    sinks = torch.randn(heads[0]) * 3 if options.get("sinks") else None
    window = int(options.get("window", 0))
    score = ScoreOptions(
        scale=head_dim**-0.5, sliding_window=window, soft_cap=float(options.get("soft_cap", 0)),
        sinks=sinks,
    )  # fmt: skip
    there = attn._replace(block_tables=attn.block_tables.where(attn.block_tables < STALE, 0))
    wide = query.float(), kv_cache.float().nan_to_num(0.0)
    expected = oracle.paged_attention(*wide, there, score)
    for row, length in enumerate(lengths):  # entries before the window are stale
        attn.block_tables[row, : max(length - window, 0) // block_size if window else 0] = STALE
    decode = attn._replace(row_bound=make_row_bound(1))
    kernel = decode_attention_cuda.kernel_for(query, kv_cache, decode, score)
    assert kernel is not None
    found = torch.full_like(query, float("nan"))
    for _ in range(2):
        decode_attention_cuda.attend(kernel, query, kv_cache, decode, score, found)
        is_row = torch.tensor(lengths) > 0
        bound = 2**-8 if dtype == torch.bfloat16 else 2**-10
        error = (found.float() - expected.float())[is_row].abs().max()
        assert error < bound * expected[is_row].float().abs().max()
        assert (found[~is_row] == 0).all()
    assert not counters.of_rows(1, query.device).any()


ROWS = [(1, 300), (1, 17), (3, 40), (1, 1), (0, 0), (1, 700), (1, 64), (70, 130), (0, 0)]


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "options"),
    [
        ((8, 2), 128, torch.bfloat16, {}),
        ((10, 2), 64, torch.float16, {"soft_cap": 3.0, "window": 100}),
        ((4, 4), 96, torch.bfloat16, {"sinks": True}),
        ((8, 1), 32, torch.bfloat16, {"sinks": True, "window": 256}),
        ((6, 2), 192, torch.bfloat16, {"window": 100}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("is_fp8", "times"), [(False, 3), (True, 1), (True, 8)])
@torch.inference_mode()
def test_rows_of_any_step(
    is_fp8: bool,
    times: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    options: dict[str, float | bool],
) -> None:
    """The rows with one token of a step whose other rows have none, or a prompt's tokens."""
    torch.manual_seed(head_dim)
    query, kv_cache, attn = make_step(ROWS * times, heads, head_dim, 16, dtype)
    sinks = torch.randn(heads[0]) * 3 if options.get("sinks") else None
    scales = torch.tensor([0.5, 3.0]) if is_fp8 else None
    score = ScoreOptions(
        scale=head_dim**-0.5, sliding_window=int(options.get("window", 0)),
        soft_cap=float(options.get("soft_cap", 0)), sinks=sinks, kv_scales=scales,
    )  # fmt: skip
    codes = kv_cache.to(FP8)  # unused slots hold NaN
    there = attn._replace(block_tables=attn.block_tables.where(attn.block_tables < STALE, 0))
    cache = codes if is_fp8 else kv_cache
    expected = oracle.paged_attention(query.float(), cache.float().nan_to_num(0), there, score)
    is_single = (attn.query_start_loc.diff() == 1).repeat_interleave(attn.query_start_loc.diff())
    found = torch.full_like(query, 7.0)
    for _ in range(2):
        attend(query, cache, attn, score, found)
        bound = 2**-8 if dtype == torch.bfloat16 else 2**-10
        error = (found.float() - expected.float())[is_single].abs().max()
        assert error < bound * expected[is_single].float().abs().max()
        assert (found[~is_single] == 7).all()
    assert not counters.of_rows(1, query.device).any()
    if is_fp8:  # as with the same numbers in 16 bits, to the bit
        score = score._replace(kv_scales=None)
        huge = score._replace(scale=3e7)  # scores whose differences are rounded
        for its_query, its_score in ((query, score), (of_many_sizes(query), score), (query, huge)):
            plain, wide = torch.full_like(query, 7.0), torch.full_like(query, 7.0)
            attend(its_query, codes, attn, its_score, plain)
            attend(its_query, codes.to(dtype), attn, its_score, wide)
            assert plain.isfinite().all() and torch.equal(plain, wide)


def of_many_sizes(query: Tensor) -> Tensor:
    """Heads of huge, tiny, no and ordinary numbers, which differ in size within a head, too."""
    size, spread = (90, 20) if query.dtype == torch.bfloat16 else (8, 5)
    factors = torch.tensor([2.0**size, 2.0**-size, 0.0, 1.0])
    of_heads = factors[torch.arange(query.shape[1]) % 4, None]
    shifts = torch.randint(-spread, 1, query.shape[1:])
    return (query.float() * of_heads * 2.0**shifts).to(query.dtype)


def test_other_steps_are_left_to_triton() -> None:
    def is_taken(
        num_rows: int, num_tokens: int, group: int = 4, block_size: int = 16, **options: bool
    ) -> bool:
        tables = torch.zeros(num_rows + 1, 1, dtype=torch.int32)  # with the empty row
        starts = torch.zeros(num_rows + 2, dtype=torch.int32)
        attn = AttentionMetadata(tables[:0], tables, starts[1:], starts, make_row_bound(0))
        query = torch.zeros(num_tokens, group, 64, dtype=torch.bfloat16)
        kv_cache = torch.zeros(2, 3, block_size, 1, 64, dtype=torch.bfloat16)
        score = ScoreOptions(scale=1.0, **options)  # type: ignore[arg-type]
        return decode_attention_cuda.kernel_for(query, kv_cache, attn, score) is not None

    assert is_taken(1024, 1024) and is_taken(1024, 4096) and is_taken(5000, 1024)
    assert not is_taken(1025, 4096)
    assert is_taken(9, 9, group=8) and not is_taken(9, 9, group=9)
    assert not is_taken(9, 9, block_size=8)
    assert not is_taken(9, 9, in_chunks=True)


def attend(
    query: Tensor, kv_cache: Tensor, attn: AttentionMetadata, options: ScoreOptions, out: Tensor
) -> None:
    kernel = decode_attention_cuda.kernel_for(query, kv_cache, attn, options)
    assert kernel is not None
    decode_attention_cuda.attend(kernel, query, kv_cache, attn, options, out)
