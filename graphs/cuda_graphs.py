"""Captures whole steps as CUDA graphs, one per step shape, and replays them.

Either all shapes are captured at the start, or the start captures the shapes that it needs, and the
other shapes are captured while the engine is idle or when a step needs them. The module knows a
step function, shapes and a static input buffer, but no model and no requests.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

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

    inputs: for each shape, the inputs of a step that consists of padding. `replay` must be given
    inputs of the same size.
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
        self._pool: Any = None
        self._waiting: set[StepShape] = set()  # shapes to capture later
        self._bucket_for = functools.lru_cache(_MAX_REMEMBERED_SIZES)(self._find_bucket)
        self.capture_s = 0.0

    @property
    def shapes(self) -> list[StepShape]:
        """The shapes that have been captured."""
        return list(self._graphs)

    @property
    def num_waiting(self) -> int:
        """Number of shapes that are to be captured later."""
        return len(self._waiting)

    def capture(self, first: Callable[[StepShape], bool] | None = None) -> None:
        """Capture shapes, the largest first, in one shared memory pool.

        first: whether to capture a shape now; None: capture all shapes now. The largest shape is
        always captured now. If memory runs out, the capture is repeated with shapes of at most half
        the largest number of tokens. Larger steps then run without a graph, and a warning is
        logged.
        """
        started = time.perf_counter()
        shapes = sorted(self._padding)
        while shapes:
            now = [s for s in shapes if first is None or first(s) or s == shapes[-1]]
            try:
                self._capture_all(now)
                self._waiting = set(shapes) - set(now)
                break
            except torch.OutOfMemoryError:
                self._graphs.clear()
                shapes = self._without_large(shapes)
        self.capture_s = time.perf_counter() - started

    def rehearse(self, step: Step) -> None:
        """Record `step` for each shape and discard the recordings, so that no kernel runs.

        step: launches every kernel of the step that will be captured; it may leave out further
        launches of the same kernels.
        """
        self._pool = torch.cuda.graph_pool_handle()
        for shape in sorted(self._padding, reverse=True):
            self._capture_one(shape, step)
        self._graphs.clear()

    def forget(self) -> None:
        """Free all graphs. Steps run uncaptured from now on."""
        self._graphs.clear()
        self._waiting.clear()
        self._bucket_for.cache_clear()

    def capture_next(self) -> bool:
        """Capture the smallest waiting shape, if any. Returns whether more shapes are waiting."""
        if self._waiting:
            self._capture_later(min(self._waiting))
        return bool(self._waiting)

    def _capture_later(self, shape: StepShape) -> None:
        self._waiting.discard(shape)
        try:
            self._capture_one(shape)
        except torch.OutOfMemoryError:
            self._waiting = set(self._without_large([*self._waiting, shape]))

    def _without_large(self, shapes: list[StepShape]) -> list[StepShape]:
        """The shapes of at most half the largest number of tokens, after memory has run out."""
        torch.cuda.empty_cache()
        limit = max(shapes).num_tokens // 2
        self._bucket_for.cache_clear()
        log.warning(
            "no memory to capture steps of more than %d tokens: they run uncaptured. "
            "Lower gpu_memory_utilization or max_num_seqs",
            limit,
        )
        return [shape for shape in shapes if shape.num_tokens <= limit]

    def _capture_all(self, shapes: list[StepShape]) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        largest = shapes[-1]
        # The largest step runs once uncaptured, because one-time set-up must not be captured.
        # Kernels may be loaded during a capture.
        self._step(largest, self._write(largest, self._padding[largest]))
        for shape in reversed(shapes):
            self._capture_one(shape)

    @torch.inference_mode()
    def _capture_one(self, shape: StepShape, step: Step | None = None) -> None:
        self._on_device = None
        inputs = self._write(shape, self._padding[shape])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
            drawn = (step or self._step)(shape, inputs)
        self._graphs[shape] = graph, drawn

    def shape_for(self, shape: StepShape) -> StepShape | None:
        """The smallest shape that holds a step of this size; None: run the step uncaptured.

        A shape that is still waiting is captured first. Running the step uncaptured instead would
        run kernels at a size for which no start has compiled them.
        """
        bucket = self._bucket_for(shape)
        if bucket is not None and bucket in self._waiting:
            self._capture_later(bucket)
        return bucket if bucket in self._graphs else None

    def _find_bucket(self, shape: StepShape) -> StepShape | None:
        """The smallest shape, captured by now or later, that holds a step of this size."""
        return shape_for(shape, [*self._graphs, *self._waiting])

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
