"""The matrix-vector kernel against a product in float64."""

from __future__ import annotations

import pytest
import torch

from compiledllm.kernels.gemv_triton import GemvTiling, gemv, gemv_tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
TILINGS = [None, GemvTiling(1, 64, 1), GemvTiling(8, 256, 2)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (7, 100), (33, 576), (96, 1536), (5, 2050)], ids=str)
def test_equals_the_exact_product(
    shape: tuple[int, int], with_bias: bool, tiling: GemvTiling | None
) -> None:
    torch.manual_seed(1)
    wide = torch.randn(shape[0], shape[1] + 5, device=DEVICE).half()
    weight = wide[:, : shape[1]]  # rows may be strided
    bias = torch.randn(shape[0], device=DEVICE).half() if with_bias else None
    x = torch.randn(1, shape[1], device=DEVICE).half()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    out = gemv(x, weight, bias, tiling)
    assert out.shape == (1, shape[0]) and out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-3)


def test_tilings_suit_every_shape() -> None:
    for num_outputs, num_inputs in ((1, 1), (4096, 1024), (28672, 4096), (4096, 14336), (9, 576)):
        tiling = gemv_tiling(num_outputs, num_inputs)
        assert tiling.columns & (tiling.columns - 1) == 0 and tiling.rows >= 1
