"""A stand-in for captured steps where there are no graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from compiledllm.graphs.buckets import StepShape, shape_for, step_shapes
from compiledllm.runner.model_runner import ModelRunner


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """A context in which torch fills new tensors with NaN, as results for padding may be NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Uncaptured:
    """Stands in for `StepGraphs`, but runs each step uncaptured: a CPU has no CUDA graphs."""

    def __init__(self, runner: ModelRunner, max_tokens: int) -> None:
        self._runner = runner
        self._shapes = step_shapes(runner.table.padding_row, max_tokens)
        spec, max_rows = runner.model.spec, runner.table.padding_row
        runner.logits = torch.empty(max_rows, spec.vocab_size)
        runner.hidden = torch.empty(max_rows, spec.hidden_size)
        self.replayed: set[StepShape] = set()

    def shape_for(self, shape: StepShape) -> StepShape | None:
        return shape_for(shape, self._shapes)

    def replay(self, shape: StepShape, inputs: np.ndarray) -> torch.Tensor:
        self.replayed.add(shape)
        with uninitialized_memory_is_nan():
            return self._runner._captured_step(shape, torch.from_numpy(inputs))
