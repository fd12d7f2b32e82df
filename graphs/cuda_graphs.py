"""Captures whole steps as CUDA graphs, one per step shape, and replays them.

The module knows a step function, shapes and a static input buffer, but no model and no requests.
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

_MAX_REMEMBERED_SIZES = 4096  # entries of the cache: step size -> captured shape

# (shape, inputs) -> drawn token ids int64 [rows]. inputs: an int64 array whose size follows from
# the shape. A step reads and writes tensors whose addresses never change. Steps of a shape differ
# only in the contents of these tensors, never in Python values.
Step = Callable[[StepShape, Tensor], Tensor]


class StepGraphs:
    """Captures `step` for a set of shapes and replays it.

    inputs: for each shape, the inputs of a step of padding, of the size that `replay` will be
    given.
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
        self.capture_s = 0.0

    @property
    def shapes(self) -> list[StepShape]:
        return list(self._graphs)

    def capture(self) -> None:
        """Capture all shapes, the largest first, in one shared memory pool.

        If memory runs out, the capture is tried again with shapes of at most half the largest
        number of tokens. Larger steps then run without a graph, and a warning is logged.
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
        self.capture_s = time.perf_counter() - started

    def _capture_all(self, shapes: list[StepShape]) -> None:
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        largest = shapes[-1]
        # Run once uncaptured: one-time set-up must not be captured. Loading kernels during capture
        # is fine.
        self._step(largest, self._write(largest, self._padding[largest]))
        for shape in reversed(shapes):
            inputs = self._write(shape, self._padding[shape])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
                drawn = self._step(shape, inputs)
            self._graphs[shape] = graph, drawn

    def _find_shape(self, shape: StepShape) -> StepShape | None:
        """The smallest captured shape that fits a step of this size, or None."""
        return shape_for(shape, self._graphs)

    def replay(self, shape: StepShape, inputs: np.ndarray) -> Tensor:
        """Run a step. Returns token ids int64 [shape.num_rows], valid until the next replay.

        Inputs equal to those of the last call are not copied to the device again.
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
