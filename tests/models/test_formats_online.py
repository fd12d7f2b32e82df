"""Online quantisation: the error that each method promises, edges, and chunks that do not show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiledllm.models.formats import online
from compiledllm.models.formats.codes import QuantizedMatrix, dequantize
from compiledllm.models.formats.online import METHODS, quantize


def spread(part: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """A value of each group or block -> one for each number."""
    n, k = matrix.codes.shape
    rows = part.repeat_interleave(matrix.rows, 0)[:n]
    return rows.repeat_interleave(matrix.group, 1)[:, :k]


@given(
    n=st.integers(1, 200),
    k=st.integers(1, 20).map(lambda count: count * 16),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_error_is_within_half_a_step(
    n: int, k: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    """Half a unit in the last of E4M3's 4 bits (or of its subnormals), or half an integer."""
    torch.manual_seed(seed)
    weight = (torch.randn(n, k) * 2.0**exponent).to(dtype)
    for method in ("fp8", "fp8_block", "int8"):
        matrix = quantize(weight, method)
        error = (dequantize(matrix) - weight.float()).abs()
        step = spread(matrix.scales, matrix)
        bound = step / 2
        if matrix.code == "fp8":
            bound = torch.maximum(weight.float().abs() / 16, step * 2**-10)
        assert (error <= bound * (1 + 1e-4)).all(), method


def test_largest_number_of_a_row_or_block_is_the_largest_code() -> None:
    weight = torch.randn(200, 300)
    assert (quantize(weight, "fp8").codes.float().abs().amax(1) == 448).all()
    assert (quantize(weight, "int8").codes.abs().amax(1) == 127).all()
    codes = quantize(weight, "fp8_block").codes.float().abs()
    blocks = [codes[i : i + 128, j : j + 128] for i in (0, 128) for j in (0, 128, 256)]
    assert all(block.max() == 448 for block in blocks)


def test_int4_is_no_worse_than_rounding_without_clipping() -> None:
    weight = torch.randn(64, 512)
    matrix = quantize(weight, "int4")
    groups = weight.view(64, 4, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale - groups).square().sum(-1)
    searched = (dequantize(matrix) - weight).view(64, 4, 128).square().sum(-1)
    assert (searched <= plain * 1.01).all()  # the scales are bfloat16
    assert searched.mean() < 0.9 * plain.mean()
    assert matrix.zeros is None and matrix.scales.dtype == torch.bfloat16


@pytest.mark.parametrize(("k", "group"), [(128, 128), (576, 64), (48, 16), (2080, 32)])
def test_int4_splits_its_groups_where_128_does_not_divide(k: int, group: int) -> None:
    weight = torch.randn(4, k)
    matrix = quantize(weight, "int4")
    assert matrix.group == group
    assert (dequantize(matrix) - weight).abs().mean() < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_small_numbers_stay_finite(method: str) -> None:
    weight = torch.zeros(130, 160)
    weight[1] = 1e-41  # a subnormal number
    back = dequantize(quantize(weight, method))
    assert (back[0] == 0).all() and back.isfinite().all() and back.abs().max() < 1e-38


@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_show_in_the_result(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 160).bfloat16()
    whole = quantize(weight, method)  # one chunk
    monkeypatch.setattr(online, "_CPU_CHUNK", 1000)
    chunked = quantize(weight, method)
    assert torch.equal(dequantize(whole), dequantize(chunked))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused(method: str, value: float) -> None:
    weight = torch.randn(8, 64)
    weight[3, 7] = value
    with pytest.raises(ValueError, match="weight holds an infinity or NaN"):
        quantize(weight, method)


def test_what_cannot_be_quantised_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'int3' is unknown; known: fp8, fp8_block, int8, int4"):
        quantize(torch.ones(2, 128), "int3")
    with pytest.raises(ValueError, match="groups of 16, got a matrix of 120 inputs"):
        quantize(torch.ones(2, 120), "int4")
    with pytest.raises(ValueError, match="weight has dtype int8"):
        quantize(torch.ones(2, 128).to(torch.int8), "fp8")
