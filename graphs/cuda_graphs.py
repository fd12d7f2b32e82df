"""Decode steps as captured CUDA graphs: one graph of the whole step for each batch-size bucket.

Knows a step function over request rows and its static buffers; no model, no requests.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.buckets import bucket_for, ladder

log = logging.getLogger("compiledllm")

# Request rows int64 [bucket] -> sampled token ids int64 [bucket]. Reads and writes tensors whose
# addresses never change; every step's differences are in them, none in Python values.
DecodeStep = Callable[[Tensor], Tensor]


class DecodeGraphs:
    """Captures `step` for buckets up to `max_rows` and replays it for any number of rows up to it.

    padding_row: the row that fills a bucket up; what the step does to it must be harmless.
    """

    def __init__(
        self, step: DecodeStep, max_rows: int, padding_row: int, device: torch.device
    ) -> None:
        self._step = step
        self._padding_row = padding_row
        self._rows = torch.full((max_rows,), padding_row, dtype=torch.int64, device=device)
        self._on_device: tuple[int, bytes] | None = None  # bucket and rows of the last replay
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.buckets: list[int] = []
        self.seconds = 0.0

    def capture(self) -> None:
        """Record all buckets, the largest first, in one memory pool.

        If memory runs out, the buckets captured so far are dropped and those of half the size
        tried; larger batches then run without a graph, and a log line says so.
        """
        started = time.perf_counter()
        sizes = ladder(len(self._rows))
        while sizes:
            try:
                self._capture_all(sizes)
                break
            except torch.OutOfMemoryError:
                self._graphs.clear()
                torch.cuda.empty_cache()
                dropped, sizes = sizes[-1], [size for size in sizes if size <= sizes[-1] // 2]
                log.warning(
                    "no memory to capture decode steps of %d requests; steps of more than %d run "
                    "uncaptured. Lower gpu_memory_utilization or max_num_seqs",
                    dropped,
                    sizes[-1] if sizes else 0,
                )
        self.buckets = sizes
        self.seconds = time.perf_counter() - started

    def _capture_all(self, sizes: list[int]) -> None:
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        for size in reversed(sizes):
            rows = self._rows[:size]
            self._step(rows)  # whatever is set up on first use must not be captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                sampled = self._step(rows)
            self._graphs[size] = graph, sampled

    def replay(self, rows: np.ndarray) -> Tensor | None:
        """Run the step for `rows`; sampled token ids [rows], valid until the next replay.

        None if no bucket holds so many rows. With the rows of the last call nothing is copied.
        """
        bucket = bucket_for(len(rows), self.buckets)
        if bucket is None:
            return None
        key = bucket, rows.tobytes()
        if key != self._on_device:
            padded = np.pad(rows, (0, bucket - len(rows)), constant_values=self._padding_row)
            self._rows[:bucket].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
            self._on_device = key
        graph, sampled = self._graphs[bucket]
        graph.replay()
        return sampled[: len(rows)]
