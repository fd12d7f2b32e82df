"""What is captured when memory runs out, and which graph serves a step."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from compiledllm.graphs.buckets import StepShape
from compiledllm.graphs.cuda_graphs import StepGraphs

SHAPES = [StepShape(n, n, 1) for n in (1, 2, 4, 8)] + [StepShape(64, 8, 0)]


class Recorder:
    """A step that needs memory for every token, and has it for `room` of them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tried: list[int] = []

    def __call__(self, shape: StepShape, inputs: torch.Tensor) -> torch.Tensor:
        self.tried.append(shape.num_tokens)
        if shape.num_tokens > self.room:
            raise torch.OutOfMemoryError(f"{shape.num_tokens} tokens are too many")
        return inputs[: shape.num_rows]


def capture(room: int, device: str, patch: pytest.MonkeyPatch) -> StepGraphs:
    inputs = {shape: np.zeros(shape.num_rows, np.int64) for shape in SHAPES}
    graphs = StepGraphs(Recorder(room), inputs, torch.device(device))
    if device == "cpu":
        patch.setattr(graphs, "_capture_all", lambda shapes: run_all(graphs, shapes))
    graphs.capture()
    return graphs


def run_all(graphs: StepGraphs, shapes: list[StepShape]) -> None:
    """Runs what would be captured: there are no graphs on a CPU."""
    for shape in reversed(shapes):
        drawn = graphs._step(shape, torch.zeros(shape.num_rows, dtype=torch.int64))
        graphs._graphs[shape] = None, drawn  # type: ignore[assignment]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_without_memory_for_large_steps_the_small_ones_are_captured(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "compiledllm"):
        graphs = capture(5, device, monkeypatch)
    assert sorted(shape.num_tokens for shape in graphs.shapes) == [1, 2, 4]
    messages = [record.getMessage() for record in caplog.records]
    assert "no memory to capture steps of more than 32 tokens" in messages[0]
    assert "no memory to capture steps of more than 4 tokens" in messages[-1]
    assert "Lower gpu_memory_utilization or max_num_seqs" in messages[-1]
    assert graphs.shape_for(StepShape(3, 3, 1)) == StepShape(4, 4, 1)
    assert graphs.shape_for(StepShape(5, 5, 1)) is None
    assert graphs.shape_for(StepShape(20, 2, 0)) is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_without_memory_for_any_step_nothing_is_captured(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = capture(0, device, monkeypatch)
    assert graphs.shapes == []
    assert graphs.shape_for(StepShape(1, 1, 1)) is None
