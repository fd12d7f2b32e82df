"""Products and norms whose rows do not depend on their neighbours, against float64 and torch.

Attention in this order has its place in test_paged_attention.py.
"""

from __future__ import annotations

import pytest
import torch

from compiledllm.kernels.fixed_order_triton import linear, rms_norm
from compiledllm.models.layers import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
SHAPES = [(1, 16), (7, 100), (40, 576), (130, 300)]  # outputs, inputs


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 64, 65, 140])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_equals_the_exact_product(
    shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    wide = torch.randn(shape[0], shape[1] + 5, device=DEVICE).to(dtype)
    weight = wide[:, : shape[1]]  # rows may be strided
    bias = torch.randn(shape[0], device=DEVICE).to(dtype) if num_rows % 2 else None
    x = torch.randn(num_rows, shape[1] + 3, device=DEVICE).to(dtype)[:, 3:]
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    out = linear(x, weight, bias)
    assert out.shape == (num_rows, shape[0]) and out.dtype == dtype
    atol, rtol = (2e-2, 2e-3) if dtype.itemsize == 2 else (1e-4, 1e-5)
    torch.testing.assert_close(out.double(), exact, atol=atol, rtol=rtol)


def test_linear_writes_into_out() -> None:
    x, weight = torch.randn(5, 40, device=DEVICE), torch.randn(33, 40, device=DEVICE)
    out = torch.full((7, 33), 9.0, device=DEVICE)
    assert linear(x, weight, None, out[:5]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:5], linear(x, weight)) and bool((out[5:] == 9).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 64, 576])
def test_rms_norm_equals_the_module(size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(9, size, device=DEVICE) * 3).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    tolerance = 2e-3 if dtype.itemsize == 2 else 1e-6
    expected = norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1024, 3072), (6144, 1024), (1000, 576), (9728, 896)], ids=str)
def test_a_row_has_the_same_bits_among_any_number(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    weight = (torch.randn(shape, device=DEVICE) * 0.05).to(dtype)
    x = torch.randn(700, shape[1], device=DEVICE).to(dtype)
    scale = torch.randn(shape[1], device=DEVICE).to(dtype)
    products, norms = linear(x, weight), rms_norm(x, scale, 1e-6)
    for count in (1, 2, 16, 17, 63, 64, 65, 128, 129, 256, 500):
        first = torch.randint(0, 701 - count, ()).item()
        rows = slice(first, first + count)
        assert torch.equal(linear(x[rows], weight), products[rows])
        assert torch.equal(rms_norm(x[rows], scale, 1e-6), norms[rows])
