"""Paged attention by FlashInfer: an alternative to Triton, and a reference in tests.

FlashInfer divides a step's work on the host, so each step must be planned before it runs. Every
captured step has its own wrappers, whose buffers keep their addresses. FlashInfer compiles kernels
on first use, which needs nvcc: `prepare` triggers the compilation and raises its errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compiledllm.kernels.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionMetadata,
    ScoreOptions,
)

_WORKSPACE_BYTES = 128 * 2**20


class _Kind(NamedTuple):
    """The properties of a layer that a plan depends on. Layers of one kind share a plan."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    options: ScoreOptions


class FlashInferBackend(AttentionBackend):
    """Plans whole steps on a single block table. Its host buffers hold one plan at a time."""

    dtypes = (torch.float16, torch.bfloat16)
    head_dims = (64, 128, 256)
    kv_dtypes = ()
    takes_sinks = False
    takes_chunks = False
    captures_prompts = False  # wrappers of a captured step have a fixed number of tokens
    takes_sampled_tokens = False
    reads_groups = False
    runs_ahead = False
    # For each kind of layer, the FlashInfer wrapper that holds the next step's plan. All engines of
    # a process can share this dict, since each engine plans right before it runs a step.
    _planned: ClassVar[dict[_Kind, Any]] = {}

    def prepare(
        self,
        layers: Iterable[AttentionLayer],
        dtype: torch.dtype,
        block_size: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        """Compile the kernels of these layers and allocate the buffers of plans."""
        self._kinds = list(dict.fromkeys(map(_kind_of, layers)))
        self._dtype, self._block_size = dtype, block_size
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._pages = torch.zeros(max_pages, dtype=torch.int32, device=device)
        self._wrappers: dict[tuple[_Kind, Hashable], Any] = {}
        one = np.ones(1, np.int64)
        self._plan(one, one, self._pages[:1], None)

    @staticmethod
    def store_kv(
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_scales: Tensor | None = None,
    ) -> None:
        """See `attention.store_kv`."""
        from compiledllm.kernels import paged_attention_triton

        paged_attention_triton.store_kv(key, value, kv_cache, slot_mapping, kv_scales)

    @staticmethod
    def paged_attention(
        query: Tensor, kv_cache: Tensor, attn: AttentionMetadata, options: ScoreOptions
    ) -> Tensor:
        """See `attention.paged_attention`. Rows and lengths come from the last plan."""
        _, num_heads, head_dim = query.shape
        kind = _Kind(num_heads, kv_cache.shape[3], head_dim, options)
        wrapper = FlashInferBackend._planned[kind]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        count = wrapper.num_tokens
        wrapper.run(query[:count].contiguous(), (kv_cache[0], kv_cache[1]), out=out[:count])
        return out

    def plan(
        self,
        rows: np.ndarray,
        computed: np.ndarray,
        counts: np.ndarray,
        block_tables: Sequence[Tensor],
        graph: Hashable = None,
    ) -> None:
        """See `AttentionBackend.plan`."""
        padding = np.ones(len(rows) - len(counts), np.int64)
        counts = np.append(counts, padding)
        lengths = np.append(computed, padding * 0) + counts
        pages = _pages_of(block_tables[0], rows, -(-lengths // self._block_size))
        self._plan(counts, lengths, pages, graph)

    def select(self, graph: Hashable) -> None:
        """Make the next ops use the last plan of this graph; None: the last uncaptured plan."""
        for kind in self._kinds:
            self._planned[kind] = self._wrappers[kind, graph]

    def _plan(
        self, counts: np.ndarray, lengths: np.ndarray, pages: Tensor, graph: Hashable
    ) -> None:
        """Plan a step for each kind of layer.

        counts, lengths: int64 [rows], new tokens and context lengths including them; at least 1.
        pages: int32, on the device, the blocks of all rows, row after row.
        """
        num_pages = -(-lengths // self._block_size)
        starts = _prefix_sums(counts)
        page_starts = _prefix_sums(num_pages)
        last_page = torch.from_numpy((lengths - (num_pages - 1) * self._block_size).astype("i4"))
        for kind in self._kinds:
            wrapper = self._wrapper(kind, graph, len(counts))
            options = kind.options
            wrapper.plan(
                starts, page_starts, pages, last_page,
                num_qo_heads=kind.num_heads, num_kv_heads=kind.num_kv_heads,
                head_dim_qk=kind.head_dim, page_size=self._block_size, causal=True,
                sm_scale=options.scale, window_left=options.sliding_window - 1,
                logits_soft_cap=options.soft_cap, q_data_type=self._dtype, kv_data_type=self._dtype,
            )  # fmt: skip
            wrapper.num_tokens = int(starts[-1])
        self.select(graph)

    def _wrapper(self, kind: _Kind, graph: Hashable, num_rows: int) -> Any:
        key = kind, graph
        if key not in self._wrappers:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

            fixed: dict[str, Any] = {}
            if graph is not None:
                starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=self._pages.device)
                fixed = {
                    "use_cuda_graph": True, "qo_indptr_buf": starts,
                    "paged_kv_indptr_buf": starts.clone(), "paged_kv_indices_buf": self._pages,
                    "paged_kv_last_page_len_buf": starts[1:].clone(),
                }  # fmt: skip
            self._wrappers[key] = Wrapper(self._workspace, "NHD", backend="fa2", **fixed)
        return self._wrappers[key]


def _kind_of(layer: AttentionLayer) -> _Kind:
    options = ScoreOptions(layer.scale, layer.sliding_window, layer.soft_cap)
    return _Kind(layer.num_heads, layer.num_kv_heads, layer.head_dim, options)


def _pages_of(block_table: Tensor, rows: np.ndarray, num_pages: np.ndarray) -> Tensor:
    """The first `num_pages` blocks of each row, row after row; int32 on the device."""
    starts = np.cumsum(num_pages) - num_pages
    columns = np.arange(num_pages.sum()) - np.repeat(starts, num_pages)
    index = np.array([np.repeat(rows, num_pages), columns])
    # A copy from pageable memory waits for the device, which is idle here without run-ahead.
    on_device = torch.from_numpy(index).to(block_table.device)
    return block_table[on_device[0], on_device[1]]


def _prefix_sums(values: np.ndarray) -> Tensor:
    sums = np.zeros(len(values) + 1, np.int32)
    np.cumsum(values, out=sums[1:])
    return torch.from_numpy(sums)
