"""Products with few rows against a product in float64."""

from __future__ import annotations

import pytest
import torch

from compiledllm.kernels.skinny_triton import Tiling, skinny_linear, tiling_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
TILINGS = [None, Tiling(1, 64, 1), Tiling(8, 256, 2), Tiling(32, 128, 4)]


@pytest.mark.pairwise
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 32])
@pytest.mark.parametrize("shape", [(1, 16), (7, 100), (33, 576), (96, 1536), (5, 2050)], ids=str)
def test_equals_the_exact_product(
    shape: tuple[int, int], num_rows: int, tiling: Tiling | None
) -> None:
    torch.manual_seed(1)
    wide = torch.randn(shape[0], shape[1] + 5, device=DEVICE).half()
    weight = wide[:, : shape[1]]  # rows may be strided
    bias = torch.randn(shape[0], device=DEVICE).half() if num_rows % 2 else None
    x = torch.randn(num_rows, shape[1], device=DEVICE).half()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    out = skinny_linear(x, weight, bias, tiling)
    assert out.shape == (num_rows, shape[0]) and out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-3)


def test_one_row_in_float32_is_not_rounded() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(1, 2050, device=DEVICE), torch.randn(160, 2050, device=DEVICE)
    out = skinny_linear(x, weight, None)
    assert out.dtype == torch.float32
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(out.double(), exact, atol=2e-4, rtol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 512, device=DEVICE).bfloat16()
    x = torch.randn(16, 512, device=DEVICE).bfloat16()
    together = skinny_linear(x, weight, None)
    for count in (2, 3, 9):
        assert torch.equal(skinny_linear(x[:count], weight, None), together[:count])


@pytest.mark.parametrize("num_rows", [1, 2, 16, 32])
def test_tilings_suit_every_shape(num_rows: int) -> None:
    for num_outputs, num_inputs in ((1, 1), (4096, 1024), (28672, 4096), (4096, 14336), (9, 576)):
        tiling = tiling_for(num_rows, num_outputs, num_inputs)
        assert tiling.columns & (tiling.columns - 1) == 0 and tiling.outputs >= 1
        assert tiling.num_warps in (1, 2, 4, 8)
