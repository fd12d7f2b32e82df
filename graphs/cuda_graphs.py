"""Whole steps as captured CUDA graphs, one for each shape that is worth it.

Knows a step function, shapes and a static input buffer; no model, no requests.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.buckets import StepShape, shape_for

log = logging.getLogger("compiledllm")

_MAX_REMEMBERED_SIZES = 4096  # step sizes for which the serving graph is remembered

# (shape, inputs int64 of the size that the shape asks for) -> drawn token ids int64 [rows]. A step
# reads and writes tensors whose addresses never change. All that differs from step to step is in
# these tensors, nothing in Python values.
Step = Callable[[StepShape, Tensor], Tensor]


class StepGraphs:
    """Captures `step` for a set of shapes and replays it.

    inputs: for each shape the inputs of a step of padding, of the size that `replay` will get.
    """

    def __init__(
        self, step: Step, inputs: Mapping[StepShape, np.ndarray], device: torch.device
    ) -> None:
        self._step = step
        self._padding = inputs
        largest = max(map(len, inputs.values()))
        self._inputs = torch.zeros(largest, dtype=torch.int64, device=device)
        self._on_device: tuple[StepShape, bytes] | None = None  # inputs of the last replay
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.shape_for = functools.lru_cache(_MAX_REMEMBERED_SIZES)(self._find_shape)
        self.seconds = 0.0

    @property
    def shapes(self) -> list[StepShape]:
        return list(self._graphs)

    def capture(self) -> None:
        """Record all shapes, the largest first, in one memory pool.

        If memory runs out, shapes of at most half as many tokens are tried. Larger steps then run
        without a graph, and a log line says so.
        """
        started = time.perf_counter()
        shapes = sorted(self._padding)
        while shapes:
            try:
                self._capture_all(shapes)
                break
            except torch.OutOfMemoryError:
                self._graphs.clear()
                torch.cuda.empty_cache()
                limit = shapes[-1].num_tokens // 2
                shapes = [shape for shape in shapes if shape.num_tokens <= limit]
                log.warning(
                    "no memory to capture steps of more than %d tokens: they run uncaptured. "
                    "Lower gpu_memory_utilization or max_num_seqs",
                    limit,
                )
        self.seconds = time.perf_counter() - started

    def _capture_all(self, shapes: list[StepShape]) -> None:
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        largest = shapes[-1]
        # Set-up on first use must not be captured; kernels may be loaded during capture.
        self._step(largest, self._write(largest, self._padding[largest]))
        for shape in reversed(shapes):
            inputs = self._write(shape, self._padding[shape])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
                drawn = self._step(shape, inputs)
            self._graphs[shape] = graph, drawn

    def _find_shape(self, shape: StepShape) -> StepShape | None:
        """The captured shape that serves a step of this size, or None."""
        return shape_for(shape, self._graphs)

    def replay(self, shape: StepShape, inputs: np.ndarray) -> Tensor:
        """Run a step; its token ids [shape.num_rows], valid until the next replay.

        With the shape and inputs of the last call nothing is copied to the device.
        """
        key = shape, inputs.tobytes()
        if key != self._on_device:
            self._write(shape, inputs)
            self._on_device = key
        graph, drawn = self._graphs[shape]
        graph.replay()
        return drawn

    def _write(self, shape: StepShape, values: np.ndarray) -> Tensor:
        inputs = self._inputs[: len(values)]
        return inputs.copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)
