"""Products of few rows with 16-bit matrices by warpgroups, on a GPU and compiled for a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import cuda_kernel, dense_linear_cuda, tensor_map
from compiledllm.kernels.dense_linear_cuda import Tiling, kernel_for, tiling_for
from compiledllm.kernels.launch import is_hopper
from compiledllm.kernels.linear import linear
from tests.kernels.test_prefill_attention_cuda import Driver
from tests.support.cuda_on_cpu import CpuKernel, use_cuda_kernels_on_cpu

BOUND = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative to the largest result


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda_kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(cuda_kernel, "CudaKernel", CpuKernel)
    monkeypatch.setattr(CpuKernel, "seed", 5)
    monkeypatch.setattr(tensor_map, "driver", Driver)
    dense_linear_cuda._kernel.cache_clear()
    tensor_map.encoded.cache_clear()


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs", "tiling", "dtype"),
    [
        (9, 100, 200, Tiling(40, 1), torch.bfloat16),  # the last outputs and inputs are partial
        (5, 300, 328, Tiling(72, 2), torch.float16),
        (32, 420, 640, Tiling(104, 4), torch.bfloat16),
        (17, 132, 72, Tiling(128, 2), torch.bfloat16),  # a block of each cluster has no inputs
        (30, 128, 1000, Tiling(72, 1, 64), torch.float16),  # slots are filled again
    ],
    ids=str,
)
def test_products_are_those_of_torch(
    num_rows: int, num_outputs: int, num_inputs: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_rows, num_inputs + 8).to(dtype)[:, :num_inputs]
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    bias = torch.randn(num_outputs).to(dtype)
    for given in (None, bias):
        out = torch.full((num_rows, num_outputs), float("nan"), dtype=dtype)
        tokens = dense_linear_cuda._tokens(num_rows)
        kernel = dense_linear_cuda._kernel(dtype, tokens, given is not None, tiling, False)
        assert kernel is not None
        found = dense_linear_cuda.product(kernel, x, weight, given, out, tiling)
        assert_near(found, x, weight, given)


def assert_near(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    bound = BOUND[x.dtype] * expected.abs().max()
    assert (found.double() - expected).abs().max() < bound


@pytest.mark.parametrize("num_multiprocessors", [66, 132])
def test_the_rule_gives_each_multiprocessor_a_share(
    num_multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_linear_cuda, "num_multiprocessors", lambda: num_multiprocessors)
    tiling_for.cache_clear()
    for num_outputs in (8, 576, 2048, 3072, 5120, 6144, 16384, 28672, 248320):
        for num_inputs in (64, 2048, 14336):
            t = tiling_for(num_outputs, num_inputs)
            assert t.outputs % 8 == 0 and 8 <= t.outputs <= 128 and t.splits in (1, 2, 4)
            assert t.shared_kib == 112 or t.num_blocks(num_outputs) <= num_multiprocessors
            for tokens in (8, 16, 32):
                assert t.stages(tokens) >= 3
                assert t.shared_bytes(tokens) <= t.shared_kib * 1024 - 1024
    tiling_for.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_products_on_a_gpu_are_those_of_torch(dtype: torch.dtype) -> None:
    shapes = ((6144, 4096), (2048, 8192), (28672, 1032), (4100, 2000), (128256, 512))
    for (num_outputs, num_inputs), num_rows in itertools.product(shapes, (2, 8, 13, 17, 32)):
        x = torch.randn(num_rows, num_inputs + 8, device="cuda").to(dtype)[:, :num_inputs]
        weight = torch.randn(num_outputs, num_inputs, device="cuda").to(dtype)
        bias = torch.randn(num_outputs, device="cuda").to(dtype)
        for given in (None, bias):
            assert (kernel_for(x, weight, given) is not None) == is_hopper()
            found = linear(x, weight, given)
            assert_near(found, x, weight, given)
            assert torch.equal(linear(x, weight, given), found)
        into = torch.empty_like(found)
        linear(x, weight, out=into)
        assert_near(into, x, weight, None)


@pytest.mark.gpu
def test_other_products_are_left_to_other_kernels() -> None:
    wide = torch.randn(4096, 4104, device="cuda", dtype=torch.bfloat16)
    x, weight, out = wide[:8, :4096], wide[:, :4096], wide[:8, :4096].T.contiguous().T
    products: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
        "unaligned rows": (wide[:8, 1:4097], weight, None),
        "columns": (wide[:4096, :8].T, weight, None),
        "unaligned matrix": (x, wide[:, 4:4100], None),
        "one row": (x[:1], weight, None),
        "many rows": (wide[:33, :4096], weight, None),
        "float32": (x.float(), weight.float(), None),
        "few outputs": (x, weight[:64], None),
        "odd outputs": (x, weight[:4094], None),
        "strided results": (x, weight, out),
    }
    for name, (rows, matrix, results) in products.items():
        assert kernel_for(rows, matrix, None, results) is None, name
        found = linear(rows, matrix, out=results)
        torch.testing.assert_close(found, rows @ matrix.T, rtol=2e-2, atol=0.5)
