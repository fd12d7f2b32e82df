"""The CUDA kernel of prompts' attention against the torch backend, on a CPU.

A C++ compiler builds the kernel with `emulated_hopper.h` in the place of the header that has the
GPU's instructions. Values, masks, barriers and layouts in shared memory are those of the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import (
    compile_ahead,
    counters,
    cuda_kernel,
    prefill_attention_cuda,
    tensor_map,
)
from compiledllm.kernels import paged_attention_torch as oracle
from compiledllm.kernels.backend import FP8, AttentionMetadata, ScoreOptions, make_row_bound
from compiledllm.kernels.compile_ahead import asking
from compiledllm.kernels.machine_code import CudaError
from compiledllm.kernels.paged_attention_triton import paged_attention
from tests.support.cuda_on_cpu import library_of, text_of

LAUNCH = """
extern "C" int emulate(int blocks, int cluster, void** arguments) {
    return launch(&%s, blocks, cluster, arguments);
}
"""
STALE = 10**6  # an entry of a block table that must not be read
ROWS = [(1, 1), (15, 15), (17, 40), (2, 300), (70, 150), (0, 0), (1, 50), (40, 333)]
Step = tuple[Tensor, Tensor, AttentionMetadata]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(prefill_attention_cuda, "CudaKernel", EmulatedKernel)
    monkeypatch.setattr(prefill_attention_cuda, "compile_together", lambda *_: None)
    monkeypatch.setattr(prefill_attention_cuda, "is_hopper", lambda: True)
    monkeypatch.setattr(tensor_map, "driver", Driver)
    for cached in (prefill_attention_cuda._kernels, tensor_map.encoded):
        cached.cache_clear()


class EmulatedKernel:
    """As `cuda_kernel.CudaKernel`, but compiled by the first launch."""

    multiprocessors = 132

    def __init__(
        self, source: str, name: str, options: Mapping[str, int], shared_bytes: int
    ) -> None:
        assert shared_bytes <= 227 * 1024
        self._text, self._options = text_of(source) + LAUNCH % name, options

    def launch(
        self, grid: Sequence[int], num_threads: int, arguments: Sequence[Any], cluster: int
    ) -> None:
        assert num_threads == 384
        values = [cuda_kernel._value_of(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stuck = self._library.emulate(*grid, cluster, addresses)
        assert not stuck, f"block {stuck - 1} waits for ever"

    def max_clusters(self, num_threads: int, cluster: int) -> int:
        assert num_threads == 384
        return self.multiprocessors // cluster

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(library_of(self._text, self._options.items())))


class Driver:
    """Encodes a tensor map as `emulated_hopper.h` reads it."""

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, made: Any, _kind: int, rank: int, address: Any, sizes: Any, strides: Any, box: Any,
        *_: Any,
    ) -> int:  # fmt: skip
        assert rank == 5 and not any(stride % 16 for stride in strides) and address.value % 16 == 0
        words = [address.value, *sizes, *strides, *box[:3]]
        made._obj.words[: len(words)] = words
        return 0


def make_step(
    rows: Sequence[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> Step:
    """Random queries over a cache whose unused slots hold NaN. rows: (new tokens, length)."""
    widths = [-(-length // block_size) for _, length in rows]
    shape = 2, sum(widths) + 3, block_size, heads[1], head_dim
    kv_cache = torch.full(shape, float("nan"), dtype=dtype)
    free = (torch.randperm(shape[1] - 1) + 1).int().split([*widths, 2])
    tables = torch.full((len(rows), max(widths) + 2), STALE, dtype=torch.int32)
    for row, (_, length) in enumerate(rows):
        tables[row, : widths[row]] = free[row]
        at = torch.arange(length)
        slots = tables[row].long()[at // block_size] * block_size + at % block_size
        new = torch.randn(2, length, heads[1], head_dim).to(dtype)
        kv_cache.view(2, -1, heads[1], head_dim)[:, slots] = new
    counts = torch.tensor([count for count, _ in rows])
    query = torch.randn(int(counts.sum()), heads[0], head_dim).to(dtype)
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    lengths = torch.tensor([length for _, length in rows], dtype=torch.int32)
    slots = torch.full((len(query),), -1)
    return query, kv_cache, AttentionMetadata(slots, tables, lengths, starts, make_row_bound(0))


def without_stale_pages(step: Step, window: int) -> AttentionMetadata:
    """The metadata with stale entries for the blocks before the windows of all queries."""
    query, kv_cache, attn = step
    tables, block_size = attn.block_tables.clone(), kv_cache.shape[2]
    counts = attn.query_start_loc.diff()
    for row, (length, count) in enumerate(zip(attn.seq_lens, counts, strict=True)):
        tables[row, : max(0, int(length - count) - window + 1) // block_size] = STALE
    return attn._replace(block_tables=tables)


def attend(step: Step, options: ScoreOptions) -> Tensor:
    """The kernel's results; 7 for rows of one token."""
    query, kv_cache, attn = step
    out = torch.full_like(query, 7.0)
    seen = without_stale_pages(step, options.sliding_window) if options.sliding_window else attn
    kernel = prefill_attention_cuda.kernel_for(query, kv_cache, options)
    assert kernel is not None
    prefill_attention_cuda.attend_prompts(kernel, query, kv_cache, seen, options, out)
    return out


def assert_equals_oracle(step: Step, options: ScoreOptions) -> None:
    """Rows of one token must stay as they are, since the decode kernel computes them."""
    query, kv_cache, attn = step
    out = attend(step, options)
    wide = kv_cache.float().nan_to_num(0.0)
    there = attn._replace(block_tables=attn.block_tables.where(attn.block_tables < STALE, 0))
    sinks = None if options.sinks is None else options.sinks.float()
    expected = oracle.paged_attention(query.float(), wide, there, options._replace(sinks=sinks))
    counts = attn.query_start_loc.diff()
    is_prompt = torch.repeat_interleave(counts > 1, counts)
    assert (out[~is_prompt] == 7.0).all()
    difference = (out.float() - expected)[is_prompt]
    bound = 4e-3 if query.dtype == torch.bfloat16 else 6e-4
    assert difference.norm() < bound * expected[is_prompt].norm()
    assert difference.abs().max() < 8 * bound * expected[is_prompt].abs().max()


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype", "options"),
    [
        ((8, 2), 128, 16, torch.bfloat16, ScoreOptions(0.09)),
        ((4, 1), 128, 32, torch.float16, ScoreOptions(0.2, sliding_window=33)),
        ((4, 2), 80, 16, torch.bfloat16, ScoreOptions(0.1)),
        ((7, 1), 64, 8, torch.bfloat16, ScoreOptions(0.2, soft_cap=5.0, sinks=torch.randn(7))),
        ((3, 3), 256, 64, torch.bfloat16, ScoreOptions(0.06, sliding_window=100)),
        ((6, 2), 64, 16, torch.float16, ScoreOptions(0.2, 1, sinks=torch.randn(6).half())),
    ],
)
def test_values(
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    options: ScoreOptions,
) -> None:
    assert_equals_oracle(make_step(ROWS, heads, head_dim, block_size, dtype), options)


FP8_SCALES = torch.tensor([0.3, 1.7])


def with_fp8_cache(step: Step) -> Step:
    query, kv_cache, attn = step
    return query, kv_cache.to(FP8), attn


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype", "options"),
    [
        ((8, 2), 128, 16, torch.bfloat16, ScoreOptions(0.09)),
        ((4, 2), 80, 64, torch.float16, ScoreOptions(0.1, sliding_window=33)),
        ((7, 1), 64, 8, torch.bfloat16, ScoreOptions(0.2, soft_cap=5.0, sinks=torch.randn(7))),
        ((3, 3), 256, 64, torch.bfloat16, ScoreOptions(0.06, sliding_window=100)),
    ],
)
def test_an_fp8_cache_equals_the_dequantised_cache_to_the_bit(
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    options: ScoreOptions,
) -> None:
    query, kv_cache, attn = with_fp8_cache(make_step(ROWS, heads, head_dim, block_size, dtype))
    page = int(attn.block_tables[-1, 0])  # of the last row, before all windows
    kv_cache[1, page, 3, 0, 5] = float("nan")
    scales = torch.tensor([0.25, 2.0])  # powers of two change no product's digits
    wide = (kv_cache.float() * scales.view(2, 1, 1, 1, 1)).to(dtype)
    expected = attend((query, wide, attn), options)
    found = attend((query, kv_cache, attn), options._replace(kv_scales=scales))
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert found.isnan().any() == (not options.sliding_window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_for_long_steps(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_attention_cuda, "_long_step", lambda _: 0)
    step = make_step([(40, 500), (1, 50), (30, 30)], (4, 2), head_dim, 16, torch.float16)
    options = ScoreOptions(0.09, sliding_window=200)
    assert_equals_oracle(step, options)
    assert_equals_oracle(with_fp8_cache(step), options._replace(kv_scales=FP8_SCALES))


SHARED = [
    ([(9, 4200)], 16),  # 8 blocks share a context
    (
        [(9, 1300), (1, 900), (20, 70), (2, 600), (1, 1), (3, 4200)],
        16,
    ),  # 4, where there are enough keys
    ([(2, 1300), (2, 600), (2, 600), (3, 1100)], 8),  # 2 of a cluster of 8
    ([(2, 900)] * 9, 8),  # each for itself in clusters of 8
    ([(40, 1100), (30, 30), (60, 2000)], 8),  # none, in clusters of 2
]


@pytest.mark.parametrize(("rows", "multiprocessors"), SHARED)
def test_blocks_that_share_a_context(
    rows: list[tuple[int, int]], multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedKernel, "multiprocessors", multiprocessors)
    step, options = make_step(rows, (4, 1), 64, 16, torch.bfloat16), ScoreOptions(0.2)
    assert_equals_oracle(step, options._replace(sinks=torch.randn(4)))
    assert_equals_oracle(with_fp8_cache(step), options._replace(kv_scales=FP8_SCALES))


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a warp and more, most of them without pieces, as in a captured step."""
    monkeypatch.setattr(EmulatedKernel, "multiprocessors", 16)
    rows = [(1, 20)] * 40 + [(33, 2500)] + [(1, 9)] * 30 + [(2, 2), (5, 600)] + [(0, 0)] * 20
    assert_equals_oracle(make_step(rows, (4, 2), 64, 16, torch.bfloat16), ScoreOptions(0.2))


def test_a_mixed_step_through_the_op() -> None:
    """The decode kernel computes rows of one token. Both kernels write to the same tensor."""
    query, kv_cache, attn = make_step(ROWS, (4, 2), 64, 16, torch.bfloat16)
    kv_cache.nan_to_num_(0.0)
    there = attn._replace(block_tables=attn.block_tables.where(attn.block_tables < STALE, 0))
    options = ScoreOptions(0.1)
    out = paged_attention(query, kv_cache, there, options)
    expected = oracle.paged_attention(query.float(), kv_cache.float(), there, options)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


MAX_CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}  # of an H200


@pytest.mark.parametrize(
    ("num_tokens", "cluster"),
    [(8192, 1), (512, 1), (256, 2), (128, 2), (64, 4), (32, 8), (16, 8), (2, 8)],
)
def test_size_of_clusters(num_tokens: int, cluster: int) -> None:
    """All blocks that share the keys of one row run at once."""
    found = prefill_attention_cuda.cluster_for(num_tokens, 8, 4, MAX_CLUSTERS.__getitem__)
    assert found == cluster


@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_blocks_that_compute_several_pieces(
    multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with partial pieces: more pieces than blocks, alone and in clusters."""
    monkeypatch.setattr(EmulatedKernel, "multiprocessors", multiprocessors)
    rows = [(33, 33), (3, 300), (2, 2), (1, 70), (34, 450), (2, 140), (5, 131)]
    windows, scaled = ScoreOptions(0.2, sliding_window=150), ScoreOptions(0.2, kv_scales=FP8_SCALES)
    for options in (ScoreOptions(0.2), windows, scaled):
        step = make_step(rows, (8, 2), 64, 16, torch.bfloat16)
        if options.kv_scales is not None:
            step = with_fp8_cache(step)
        for _ in range(2):  # a launch leaves the counter of programs as the next one needs it
            assert_equals_oracle(step, options)
            assert counters.of_cache(step[1]).item() == 0


def test_launches_on_other_caches_count_for_themselves() -> None:
    caches = [torch.zeros(8) for _ in range(3)]
    found = [counters.of_cache(cache).data_ptr() for cache in caches]
    assert len(set(found)) == 3
    assert found == [counters.of_cache(cache).data_ptr() for cache in caches]


def test_all_steps_use_the_kernels_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster belongs to a launch, so that no step size compiles a kernel after the start."""
    query, kv_cache, _ = make_step([(40, 40)], (4, 2), 64, 16, torch.bfloat16)
    options = ScoreOptions(0.1)
    kernel_for = prefill_attention_cuda.kernel_for
    assert kernel_for(query, kv_cache, options) is not None
    monkeypatch.setattr(prefill_attention_cuda, "CudaKernel", None)  # compiles no other
    monkeypatch.setattr(prefill_attention_cuda, "_long_step", lambda _: 8)
    found = [kernel_for(query[:size], kv_cache, options) for size in (2, 8, 40)]
    assert None not in found
    assert found[0] != found[1] == found[2]


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_for = prefill_attention_cuda.kernel_for
    query, kv_cache, _ = make_step([(4, 4)], (4, 2), 64, 16, torch.bfloat16)
    assert kernel_for(query, kv_cache, ScoreOptions(0.1)) is not None
    assert kernel_for(query, kv_cache.half(), ScoreOptions(0.1)) is None
    narrow = torch.zeros(2, 3, 16, 2, 72, dtype=query.dtype)
    assert kernel_for(query, narrow, ScoreOptions(0.1)) is not None
    assert kernel_for(query, narrow.to(FP8), ScoreOptions(0.1)) is None
    assert kernel_for(query.float(), kv_cache.float(), ScoreOptions(0.1)) is None
    narrow = torch.zeros(2, 3, 16, 2, 60, dtype=query.dtype)
    assert kernel_for(query[..., :60], narrow, ScoreOptions(0.1)) is None
    odd = torch.zeros(query.numel() + 8, dtype=query.dtype)[1 : query.numel() + 1].view_as(query)
    assert kernel_for(odd, kv_cache, ScoreOptions(0.1)) is None
    monkeypatch.setattr(prefill_attention_cuda, "is_hopper", lambda: False)
    assert kernel_for(query, kv_cache, ScoreOptions(0.1)) is None


def test_triton_stands_in_for_a_kernel_that_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise CudaError("no compiler")

    monkeypatch.setattr(prefill_attention_cuda, "CudaKernel", fails)
    query, kv_cache, _ = make_step([(4, 4)], (4, 2), 64, 16, torch.bfloat16)
    for _ in range(2):
        assert prefill_attention_cuda.kernel_for(query, kv_cache, ScoreOptions(0.1)) is None
    assert caplog.text.count("no compiler") == 1


def test_triton_stands_in_for_a_kernel_that_was_asked_for_and_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(*_: object) -> EmulatedKernel:
        if compile_ahead.is_asking():
            return EmulatedKernel("prefill_attention.cu", "prefill_attention", {}, 0)
        raise CudaError("no compiler")

    monkeypatch.setattr(prefill_attention_cuda, "CudaKernel", made)
    query, kv_cache, attn = make_step([(4, 4)], (4, 2), 64, 16, torch.bfloat16)
    options, out = ScoreOptions(0.1), torch.zeros_like(query)
    with asking():
        kernel = prefill_attention_cuda.kernel_for(query, kv_cache, options)
        assert kernel is not None
        prefill_attention_cuda.attend_prompts(kernel, query, kv_cache, attn, options, out)
    assert not out.any()
    assert prefill_attention_cuda.kernel_for(query, kv_cache, options) is None
