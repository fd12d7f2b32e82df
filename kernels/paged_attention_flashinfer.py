"""Paged attention by FlashInfer: the fallback, and a second opinion in tests.

FlashInfer decides on the host how a step's work is split, so somebody has to `plan` each step
before it is run; what was planned stays in this file. A captured step has wrappers of its own,
whose buffers keep their addresses. FlashInfer compiles its kernels when they are first asked for,
which needs nvcc: `Planner` does that when it is made, and raises whatever goes wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 * 2**20


class AttentionKind(NamedTuple):
    """What FlashInfer must know of a layer to plan for it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int  # 0: none
    soft_cap: float  # 0: none


_planned: dict[AttentionKind, Any] = {}  # the wrappers of the step that runs next


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `attention.store_kv`."""
    from compiledllm.kernels import paged_attention_triton

    paged_attention_triton.store_kv(key, value, kv_cache, slot_mapping)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: None = None,
) -> Tensor:
    """See `attention.paged_attention`. Rows and lengths are those of the last `Planner.plan`."""
    assert sinks is None  # the runner does not choose this backend for a model with sinks
    _, num_heads, head_dim = query.shape
    kind = AttentionKind(num_heads, kv_cache.shape[3], head_dim, scale, sliding_window, soft_cap)
    wrapper = _planned[kind]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    count = wrapper.num_tokens
    wrapper.run(query[:count].contiguous(), (kv_cache[0], kv_cache[1]), out=out[:count])
    return out


class Planner:
    """Tells FlashInfer what each step consists of.

    kinds: of the model's layers. max_pages: most blocks of all rows of a step together.
    """

    def __init__(
        self,
        kinds: Iterable[AttentionKind],
        dtype: torch.dtype,
        block_size: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        self._kinds = list(dict.fromkeys(kinds))
        self._dtype, self._block_size = dtype, block_size
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._pages = torch.zeros(max_pages, dtype=torch.int32, device=device)
        self._wrappers: dict[tuple[AttentionKind, Hashable], Any] = {}
        one = np.ones(1, np.int64)
        self.plan(one, one, self._pages[:1])

    def plan(
        self, counts: np.ndarray, lengths: np.ndarray, pages: Tensor, graph: Hashable = None
    ) -> None:
        """Make the ops ready for a step.

        counts, lengths: int64 [rows], new tokens and context length with them, at least 1. pages:
        int32 on the device, the rows' blocks one after the other. graph: names a captured step,
        whose number of rows and tokens is always the same; `select` it before it is captured.
        """
        num_pages = -(-lengths // self._block_size)
        starts = _prefix_sums(counts)
        page_starts = _prefix_sums(num_pages)
        last_page = torch.from_numpy((lengths - (num_pages - 1) * self._block_size).astype("i4"))
        for kind in self._kinds:
            wrapper = self._wrapper(kind, graph, len(counts))
            wrapper.plan(
                starts, page_starts, pages, last_page,
                num_qo_heads=kind.num_heads, num_kv_heads=kind.num_kv_heads,
                head_dim_qk=kind.head_dim, page_size=self._block_size, causal=True,
                sm_scale=kind.scale, window_left=kind.sliding_window - 1,
                logits_soft_cap=kind.soft_cap, q_data_type=self._dtype, kv_data_type=self._dtype,
            )  # fmt: skip
            wrapper.num_tokens = int(starts[-1])
        self.select(graph)

    def select(self, graph: Hashable = None) -> None:
        """The next step is the one last planned for this graph, or for none."""
        for kind in self._kinds:
            _planned[kind] = self._wrappers[kind, graph]

    def _wrapper(self, kind: AttentionKind, graph: Hashable, num_rows: int) -> Any:
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


def _prefix_sums(values: np.ndarray) -> Tensor:
    sums = np.zeros(len(values) + 1, np.int32)
    np.cumsum(values, out=sums[1:])
    return torch.from_numpy(sums)
