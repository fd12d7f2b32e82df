"""Products of many rows with codes in records, compiled for a CPU: every layout and block size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import (
    quantized_cuda,
    quantized_experts_cuda,
    tensor_map,
    warpgroup_linear_cuda,
)
from compiledllm.kernels.arrange_triton import arranged
from compiledllm.kernels.moe import experts_in_torch
from compiledllm.kernels.packed import Layout
from compiledllm.kernels.quantized_experts_cuda import ExpertMatrix
from compiledllm.kernels.records import pack_records
from compiledllm.kernels.warpgroup_linear_cuda import _TILINGS, Matrix, Tiling, tiling_of_matrix
from compiledllm.models.formats.codes import dequantize
from tests.kernels.test_prefill_attention_cuda import Driver
from tests.kernels.test_quantized_on_cpu import make_matrix, pack
from tests.support.cuda_on_cpu import CpuKernel, use_cuda_kernels_on_cpu


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads take turns in random orders, and copies arrive late."""
    use_cuda_kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(warpgroup_linear_cuda, "CudaKernel", CpuKernel)
    for module in (warpgroup_linear_cuda, quantized_experts_cuda):
        monkeypatch.setattr(module, "is_hopper", lambda: True)
    monkeypatch.setattr(CpuKernel, "seed", 5)
    warpgroup_linear_cuda._kernel.cache_clear()
    tiling_of_matrix.cache_clear()
    monkeypatch.setattr(tensor_map, "driver", Driver)
    tensor_map.encoded.cache_clear()


@pytest.mark.parametrize(
    ("kind", "tiling", "dtype"),
    [
        ("mxfp4", Tiling(8, 1, 2, 3), torch.bfloat16),
        ("int4", Tiling(16, 1, 2, 2), torch.bfloat16),
        ("nvfp4", Tiling(32, 1, 2, 2), torch.bfloat16),
        ("Q4_K", Tiling(64, 1, 1, 2), torch.float16),
        ("int4, zeros", Tiling(128, 2, 1, 1), torch.float16),
        ("Q6_K", Tiling(256, 1, 1, 1), torch.bfloat16),
        ("mxfp4", Tiling(128, 1, 1, 1), torch.float16),
        ("fp8", Tiling(16, 1, 2, 2), torch.bfloat16),
        ("fp8 blocks", Tiling(32, 1, 2, 2), torch.bfloat16),
        ("int8, zeros", Tiling(8, 1, 2, 3), torch.float16),
        ("fp8 blocks", Tiling(128, 2, 1, 1), torch.float16),
    ],
    ids=str,
)
@torch.inference_mode()
def test_products_equal_those_of_the_dequantised_matrix(
    kind: str, tiling: Tiling, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block of rows has few rows, and the second block of outputs few outputs."""
    monkeypatch.setattr("tests.kernels.test_quantized_on_cpu.NUM_OUTPUTS", tiling.outputs + 21)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    num_inputs = 512 if "K" in kind else 384 if "blocks" in kind else 320
    spec, matrix = make_matrix(kind, num_inputs)
    format, (codes, scales, zeros, _, row_scales) = pack(spec, matrix, num_inputs)
    assert codes is not None
    # Of six blocks with the tiling of 32 rows, four find no inputs.
    two_or_more = (2, 6) if tiling.tokens == 32 else (2,)
    for num_rows, all_splits in ((tiling.tokens + 3, (1,)), (tiling.tokens // 2 + 1, two_or_more)):
        x, bias = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(tiling.outputs + 21)
        out = torch.empty(num_rows, len(bias), dtype=dtype)
        rows = arranged(x, num_inputs, format.layout, tiling.tokens, None, None)
        packed = Matrix(codes, scales, zeros, row_scales, bias.to(dtype), format.layout)
        expected = x.double() @ dequantize(matrix).double().T + bias.to(dtype).double()
        bound = 2**-8 if dtype == torch.bfloat16 else 2**-11
        for splits in all_splits:
            found = warpgroup_linear_cuda.product(rows, packed, out, tiling, splits=splits)
            assert (found.double() - expected).abs().max() < bound * expected.abs().max()


def _experts_of(num_experts: int, num_outputs: int, num_inputs: int) -> tuple[ExpertMatrix, Tensor]:
    """MXFP4 matrices of experts, and the same matrices in bfloat16."""
    layout, shape = Layout("fp4", 4, "uint8", False), (num_outputs, num_inputs)
    num_scales = 4 * -(-num_inputs // 128)
    records, weights = [], []
    for _ in range(num_experts):
        codes = torch.randint(0, 16, shape, dtype=torch.uint8)
        scales = torch.randint(122, 128, (num_outputs, num_scales), dtype=torch.uint8)
        records.append(pack_records(codes, scales, None, "fp4"))
        parts = records[-1], None, None, None, layout
        weights.append(quantized_cuda.dequantized(*parts, *shape, torch.bfloat16))
    bias = torch.randn(num_experts, num_outputs).bfloat16()
    row_scales = torch.ones(num_experts, num_outputs)
    packed = ExpertMatrix(torch.stack(records), None, None, row_scales, bias, layout)
    return packed, torch.stack(weights)


@pytest.mark.parametrize(("num_tokens", "limit"), [(5, 7.0), (40, 0.0)])
@torch.inference_mode()
def test_experts_equal_those_of_the_dequantised_matrices(num_tokens: int, limit: float) -> None:
    torch.manual_seed(num_tokens)
    num_experts, hidden, size = 4, 160, 96
    up, up_weights = _experts_of(num_experts, 2 * size, hidden)
    down, down_weights = _experts_of(num_experts, hidden, size)
    x = (torch.randn(num_tokens, hidden) / 8).bfloat16()
    ids = torch.rand(num_tokens, num_experts - 1).topk(2).indices.int()  # one expert has no items
    found = quantized_experts_cuda.experts(x, ids, up, down, 1.7, limit)
    biases = up.bias, down.bias
    expected = experts_in_torch(x, ids, up_weights, down_weights, *biases, 1.7, limit)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_wide_and_narrow_matrices_have_tilings_that_fill_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warpgroup_linear_cuda, "num_multiprocessors", lambda: 132)
    assert tiling_of_matrix(50, 28672, 4096) == tiling_of_matrix(64, 28672, 4096)
    assert tiling_of_matrix(64, 28672, 4096) == (_TILINGS[64], 1)
    assert tiling_of_matrix(64, 4096, 14336) == (_TILINGS[64], 6)
    assert tiling_of_matrix(128, 28672, 4096) == (_TILINGS[128], 1)
    assert tiling_of_matrix(256, 4096, 14336) == (Tiling(128, 1, 1, 1), 2)
    assert tiling_of_matrix(1024, 28672, 4096) == (_TILINGS[256], 1)


@pytest.mark.parametrize("tiling", [*_TILINGS.values(), Tiling(128, 1, 1, 1)], ids=str)
def test_copies_of_the_largest_records_fit_into_shared_memory(tiling: Tiling) -> None:
    record_bytes = 16 * (96 + 8 * 4)  # codes of 6 bits, and eight scales in float32
    assert tiling.stages(record_bytes) >= 2
    assert tiling.blocks * (tiling.shared_bytes(record_bytes) + 1024) <= 228 * 1024
