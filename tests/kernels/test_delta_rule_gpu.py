"""State layers' kernels on a GPU: real shapes, every tiling of the benchmark, captured calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels.chunked_delta_rule_triton import ChunkTiling, ScanTiling
from compiledllm.kernels.delta_rule import gated_delta_rule
from compiledllm.kernels.delta_rule_triton import StepTiling, delta_rule
from compiledllm.kernels.short_convolution import short_convolution, short_convolution_reference
from tests.support.state_layers import (
    KEPT,
    STEPS,
    DeltaInputs,
    assert_near,
    make_rows,
    relative_error,
)

pytestmark = pytest.mark.gpu

HEADS, DIMS = (16, 32), (128, 128)  # Qwen3.5-9B and Qwen3.6-35B-A3B
LARGE = {
    "prompt": [(1024, 0)],
    "long": [(8192, 100)],
    "batch": [(2000, 0), (3, 500), (1, 90), (1024, 64), (0, 0), (777, 7), (1, 0)],
}
SCANS = [
    ScanTiling(columns, warps, stages)
    for columns, warps, stages in (
        *((16, 4, 2), (32, 4, 2), (32, 4, 3), (32, 8, 2)),
        *((64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 1), (128, 8, 2)),
    )
]
STEP_TILINGS = [StepTiling(16, 1), StepTiling(32, 2), StepTiling(64, 4), StepTiling(128, 8)]


def make_case(step: list[tuple[int, int]], dtype: torch.dtype = torch.bfloat16) -> DeltaInputs:
    return DeltaInputs(step, HEADS, DIMS, dtype, torch.float32, "cuda")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", {**STEPS, **LARGE})
def test_real_shapes(step: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    case = DeltaInputs({**STEPS, **LARGE}[step], HEADS, DIMS, dtype, state_dtype, "cuda")
    largest = 5e-5 if state_dtype == torch.float32 else 1e-2
    assert_near(case, float32_error=largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_real_shapes_with_borders(name: str, dtype: torch.dtype) -> None:
    step, borders = KEPT[name]
    assert_near(DeltaInputs(step, HEADS, DIMS, dtype, torch.float32, "cuda", borders), 5e-5)


@pytest.mark.parametrize("scan", SCANS, ids=str)
def test_every_scan_tiling(scan: ScanTiling) -> None:
    borders = [1984, 2, 0, 1000, 0, 0, 0]
    case = DeltaInputs(LARGE["batch"], HEADS, DIMS, torch.bfloat16, device="cuda", borders=borders)
    expected, _ = case.exact()
    assert relative_error(delta_rule(*case, scan=scan), expected) < 1e-2


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("warps", [4, 8])
def test_every_chunk_tiling(warps: int, precision: str) -> None:
    case = make_case(LARGE["batch"])
    expected, _ = case.exact()
    out = delta_rule(*case, chunk=ChunkTiling(warps, precision))
    assert relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("tiling", STEP_TILINGS, ids=str)
def test_every_step_tiling(tiling: StepTiling) -> None:
    case = make_case(STEPS["decode"])
    expected, _ = case.exact()
    assert relative_error(delta_rule(*case, step=tiling), expected) < 1e-2


@pytest.mark.parametrize("step", [STEPS["decode"], LARGE["batch"]], ids=["decode", "batch"])
def test_equal_inputs_give_equal_bits(step: list[tuple[int, int]]) -> None:
    case = make_case(step)
    states = case.state.clone()
    first, after = gated_delta_rule(*case), case.state.clone()
    for _ in range(20):
        case.state.copy_(states)
        assert torch.equal(gated_delta_rule(*case), first)
        assert torch.equal(case.state.nan_to_num(), after.nan_to_num())


# Steps with the same number of tokens and rows, which one captured call must serve.
ALIKE = {
    "decode": [[(1, 5)] * 8, [(1, 0)] * 4 + [(1, 3)] * 4, [(1, 0), (1, 9)] * 4],
    "prompts": [
        [(300, 0), (1, 4), (99, 6)],
        [(1, 0), (398, 1), (1, 7)],
        [(64, 0), (65, 0), (271, 64)],
        [(400, 33), (0, 0), (0, 0)],
    ],
}


@pytest.mark.parametrize("kind", ALIKE)
def test_a_captured_call_serves_other_rows(kind: str) -> None:
    steps = ALIKE[kind]
    case = make_case(steps[0])
    mixed = case.query._base
    assert mixed is not None
    channels = mixed.shape[1]
    weight = torch.randn(channels, 4, device="cuda").bfloat16()
    window = torch.randn(len(case.state), channels, 3, device="cuda").bfloat16()
    case.state.nan_to_num_()

    def call() -> tuple[Tensor, Tensor]:
        tensors = mixed, weight, None, window, *case.rows
        convolved = short_convolution(*tensors, "silu", case.row_bound)
        return gated_delta_rule(*case), convolved

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for step in steps[1:] + steps[:1]:
        for kept, new in zip(case.rows, make_rows(step, "cuda"), strict=True):
            kept.copy_(new)
        expected, states = case.exact()
        windows = window.clone()
        convolved = short_convolution_reference(mixed, weight, None, windows, *case.rows, "silu")
        graph.replay()
        assert relative_error(outputs[0], expected) < 1e-2
        assert relative_error(case.state, states) < 1e-2
        torch.testing.assert_close(outputs[1], convolved, atol=3e-2, rtol=2e-2)
        assert torch.equal(window, windows)
