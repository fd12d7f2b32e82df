"""The CUDA kernel of decode rows' attention against the torch backend, compiled for a CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from compiledllm.kernels import counters, cuda_kernel, decode_attention_cuda
from compiledllm.kernels import paged_attention_torch as oracle
from compiledllm.kernels.backend import ScoreOptions
from tests.kernels.test_prefill_attention_cuda import STALE, make_step
from tests.support.cuda_on_cpu import CpuKernel

NUM_BLOCKS = 64


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(cuda_kernel, "CudaKernel", CpuKernel)
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
    query, kv_cache, attn = make_step(rows, heads, head_dim, block_size, dtype)
    attn.seq_lens.copy_(torch.tensor(lengths))
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
    kernel = decode_attention_cuda.kernel_for(query, kv_cache, score)
    assert kernel is not None
    found = torch.full_like(query, float("nan"))
    for _ in range(2):
        decode_attention_cuda.attend(kernel, query, kv_cache, attn, score, found)
        is_row = torch.tensor(lengths) > 0
        bound = 2**-8 if dtype == torch.bfloat16 else 2**-10
        error = (found.float() - expected.float())[is_row].abs().max()
        assert error < bound * expected[is_row].float().abs().max()
        assert (found[~is_row] == 0).all()
    assert not counters.of_rows(1, query.device).any()
