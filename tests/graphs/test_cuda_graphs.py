"""What is captured when memory runs out, and which graph serves a step."""

from __future__ import annotations

import logging
from collections.abc import Callable

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


def capture(
    room: int,
    device: str,
    patch: pytest.MonkeyPatch,
    first: Callable[[StepShape], bool] | None = None,
) -> StepGraphs:
    inputs = {shape: np.zeros(shape.num_rows, np.int64) for shape in SHAPES}
    graphs = StepGraphs(Recorder(room), inputs, torch.device(device))
    if device == "cpu":
        without_cuda(graphs, patch)
    graphs.capture(first)
    return graphs


def without_cuda(graphs: StepGraphs, patch: pytest.MonkeyPatch) -> None:
    """Run what would be captured: there are no graphs on a CPU."""

    def capture_one(shape: StepShape) -> None:
        drawn = graphs._step(shape, torch.zeros(shape.num_rows, dtype=torch.int64))
        graphs._graphs[shape] = None, drawn

    patch.setattr(graphs, "_capture_one", capture_one)
    patch.setattr(graphs, "_write", lambda shape, values: torch.from_numpy(values))
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


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


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def is_small(shape: StepShape) -> bool:
    return shape.num_tokens <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_the_rest_is_captured_when_idle(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = capture(99, device, monkeypatch, is_small)
    assert sorted(graphs.shapes) == [*SHAPES[:2], SHAPES[-1]] and graphs.num_waiting == 2
    assert graphs.shape_for(StepShape(2, 2, 1)) == SHAPES[1] and graphs.num_waiting == 2
    assert graphs.capture_next() and SHAPES[2] in graphs.shapes
    assert graphs.shape_for(StepShape(3, 3, 1)) == SHAPES[2]
    assert not graphs.capture_next() and not graphs.capture_next()
    assert sorted(graphs.shapes) == SHAPES and graphs.num_waiting == 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_step_needs_is_captured_before_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = capture(99, device, monkeypatch, is_small)
    assert graphs.shape_for(StepShape(7, 7, 1)) == SHAPES[3]  # and not the next larger graph
    assert SHAPES[3] in graphs.shapes and graphs.num_waiting == 1


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_runs_out_later_ends_the_capturing_of_large_steps(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = capture(99, device, monkeypatch, is_small)
    graphs._step.room = 4  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "compiledllm"):
        assert graphs.shape_for(StepShape(7, 7, 1)) is None
    assert "no memory to capture steps of more than 4 tokens" in caplog.text
    assert graphs.num_waiting == 1 and not graphs.capture_next()
    assert graphs.shape_for(StepShape(3, 3, 1)) == SHAPES[2]
    assert graphs.shape_for(StepShape(7, 7, 1)) is None
    assert len(graphs.shapes) == 4


@torch.inference_mode()
@pytest.mark.gpu
def test_graphs_captured_between_replays_leave_the_others_right() -> None:
    def step(shape: StepShape, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[: shape.num_rows] * 2

    padding = {shape: np.zeros(shape.num_rows, np.int64) for shape in SHAPES}
    graphs = StepGraphs(step, padding, torch.device("cuda"))
    graphs.capture(is_small)
    for _ in range(3):
        for size in (1, 2, 4, 8):
            shape = StepShape(size, size, 1)
            values = np.arange(size) + 5
            assert graphs.shape_for(shape) == shape
            assert graphs.replay(shape, values).tolist() == (2 * values).tolist()
    assert len(graphs.shapes) == len(SHAPES)
