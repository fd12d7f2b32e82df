"""The canonical quantised matrix, and FP8: what the stored numbers mean, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiledllm.models.formats.codes import (
    QuantizedMatrix,
    dequantize,
    e2m1_values,
    even_groups,
    one_level,
    with_row_scales,
)
from compiledllm.models.formats.fp8 import from_fp8
from compiledllm.models.formats.modelopt import from_modelopt_fp8_blocks, from_modelopt_nvfp4
from compiledllm.models.formats.mxfp4 import from_mxfp4_blocks

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp8_codes(n: int, k: int) -> Tensor:
    return (torch.randn(n, k) * 100).to(torch.float8_e4m3fn)


def factor(
    matrix: QuantizedMatrix, part: Tensor, factors: Tensor | None, at: tuple[int, int]
) -> Tensor:
    if factors is None:
        return part[at].float()
    span = part.shape[1] // factors.shape[1]
    return (part[at].double() * factors[at[0], at[1] // span].double()).float()


def element_by_element(matrix: QuantizedMatrix) -> Tensor:
    """The definition in `QuantizedMatrix`'s docstring, one element at a time, in float32."""
    n, k = matrix.codes.shape
    out = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            at = i // matrix.rows, j // matrix.group
            value = matrix.codes[i, j].float()
            if matrix.code == "fp4":
                code = int(value)
                value = torch.tensor(E2M1[code & 7] * (-1 if code & 8 else 1))
            if matrix.zeros is not None:
                value = value - matrix.zeros[at].float()
            elif matrix.code == "int4" and matrix.minima is None:
                value = value - 8
            value = value * factor(matrix, matrix.scales, matrix.super_scales, at)
            if matrix.minima is not None:
                value = value + factor(matrix, matrix.minima, matrix.super_minima, at)
            out[i, j if matrix.permutation is None else matrix.permutation[j]] = value
    return out


@given(
    code=st.sampled_from(["int4", "int8", "fp4"]),
    n=st.integers(1, 5),
    num_groups=st.integers(1, 4),
    group=st.integers(1, 6),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_every_combination_of_parts_means_what_the_docstring_says(
    code: str, n: int, num_groups: int, group: int, extras: tuple[bool, ...], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    has_zeros, has_minima, is_permuted, has_two_levels = extras
    spans = 2 if num_groups % 2 == 0 else 1
    low, high, dtype = (-128, 128, torch.int8) if code == "int8" else (0, 16, torch.uint8)
    shape = n, num_groups
    matrix = QuantizedMatrix(
        code,
        torch.randint(low, high, (n, num_groups * group), generator=draw).to(dtype),
        torch.randn(shape, generator=draw),
        torch.randint(low, high, shape, generator=draw).to(dtype) if has_zeros else None,
        torch.randn(shape, generator=draw) if has_minima else None,
        torch.randn(n, spans, generator=draw) if has_two_levels else None,
        torch.randn(n, spans, generator=draw) if has_two_levels and has_minima else None,
        torch.randperm(num_groups * group, generator=draw) if is_permuted else None,
    )
    assert torch.equal(dequantize(matrix), element_by_element(matrix))
    assert one_level(matrix).super_scales is None
    assert torch.equal(dequantize(one_level(matrix)), dequantize(matrix))


def test_permuted_matrix_multiplies_the_permuted_input() -> None:
    order = torch.randperm(32)
    codes = torch.randint(-128, 128, (3, 32)).to(torch.int8)
    matrix = QuantizedMatrix("int8", codes, torch.rand(3, 4), permutation=order)
    plain = QuantizedMatrix("int8", codes, matrix.scales)
    x = torch.randn(2, 32)
    torch.testing.assert_close(x @ dequantize(matrix).T, x[:, order] @ dequantize(plain).T)


def test_e2m1_codes_have_the_format_s_sixteen_values() -> None:
    expected = torch.tensor([*E2M1, *(-value for value in E2M1)])
    values = e2m1_values(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))  # with -0.0


def test_leading_dimensions_are_a_batch_of_matrices() -> None:
    codes = torch.randint(0, 16, (3, 2, 4, 8)).to(torch.uint8)
    scales = torch.rand(3, 2, 4, 2)
    whole = dequantize(QuantizedMatrix("int4", codes, scales))
    assert torch.equal(whole[2, 1], dequantize(QuantizedMatrix("int4", codes[2, 1], scales[2, 1])))


@given(k=st.integers(1, 600), group=st.sampled_from([1, 16, 32, 128]))
def test_even_groups_give_each_column_the_scale_it_had(k: int, group: int) -> None:
    part = torch.rand(2, -(-k // group))
    even = even_groups(part, k, group)
    size = k // even.shape[1]
    columns = torch.arange(k)
    assert torch.equal(even[:, columns // size], part[:, columns // group])


# FP8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)], ids=str)
def test_fp8_scale_of_a_tensor_or_of_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale = fp8_codes(6, 40), torch.rand(shape).to(dtype)
    matrix = from_fp8(weight, scale)
    column = scale.float().reshape(-1, 1)
    assert torch.equal(dequantize(matrix), weight.float() * column)
    assert matrix.scales.shape == (6, 1) and matrix.scales.dtype == dtype


@given(n=st.integers(1, 300), k=st.integers(1, 300), seed=st.integers(0, 2**16))
def test_fp8_blocks_end_where_the_matrix_ends(n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, scale = fp8_codes(n, k), torch.rand(-(-n // 128), -(-k // 128))
    matrix = from_fp8(weight, scale, (128, 128), scale_field="weight_scale_inv")
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    expected = weight.float() * scale[rows][:, columns]
    assert torch.equal(dequantize(matrix), expected)
    by_rows = with_row_scales(matrix)
    assert by_rows.rows == 1 and torch.equal(dequantize(by_rows), expected)


def test_fp8_scales_may_be_powers_of_two_in_one_byte() -> None:
    weight = fp8_codes(128, 256)
    scale = torch.tensor([[100, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    expected = weight.float() * torch.tensor([2.0**-27, 8.0]).repeat_interleave(128)
    assert torch.equal(dequantize(from_fp8(weight, scale, (128, 128))), expected)


WEIGHT = torch.zeros(256, 384, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("weight", "scale", "block", "message"),
    [
        (
            WEIGHT.float().to(torch.float8_e4m3fnuz),
            torch.ones(()),
            None,
            "weight has dtype float8_e4m3fnuz",
        ),
        (WEIGHT.float().to(torch.float8_e5m2), torch.ones(()), None, "expected float8_e4m3fn"),
        (WEIGHT[0], torch.ones(()), None, r"weight has shape \[384\]"),
        (WEIGHT, torch.ones(384), None, r"s has shape \[384\], expected \[256, 1\] or \[256\]"),
        (WEIGHT, torch.ones(256), (128, 128), r"s has shape \[256\], expected \[2, 3\]"),
        (WEIGHT, torch.ones(3, 2), (128, 128), r"s has shape \[3, 2\], expected \[2, 3\]"),
        (WEIGHT, torch.ones(2, 3), (64, 128), r"weight_block_size is \[64, 128\]"),
        (WEIGHT, torch.ones((), dtype=torch.int32), None, "s has dtype int32"),
        (WEIGHT, torch.tensor(float("nan")), None, "s holds an infinity or NaN"),
    ],
)
def test_fp8_refuses_inconsistent_tensors_by_name(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_fp8(weight, scale, block, scale_field="s")


# ModelOpt


@pytest.mark.parametrize(("n", "k", "shape"), [(256, 384, (2, 1, 3, 1)), (100, 128, ())])
def test_modelopt_fp8_blocks(n: int, k: int, shape: tuple[int, ...]) -> None:
    weight, scale = fp8_codes(n, k), torch.rand(shape)
    spread = scale.reshape(-(-n // 128), -1).repeat_interleave(128, 0)[:n]
    expected = weight.float() * spread.repeat_interleave(128, 1)
    matrix = from_modelopt_fp8_blocks(weight, scale)
    assert torch.equal(dequantize(matrix), expected) and matrix.block == 128
    with pytest.raises(ValueError, match=r"weight_scale has shape \[1, 1\], expected \[2, 1\]"):
        from_modelopt_fp8_blocks(fp8_codes(256, 128), torch.rand(()))


def test_modelopt_nvfp4_global_scale_multiplies() -> None:
    """As `NVFP4QTensor.dequantize`: the scales' product first, then one product a value."""
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    scale = (torch.rand(64, 32) * 448).to(torch.float8_e4m3fn)
    scale_2 = torch.tensor(0.37 / 2688)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack((values[every_byte.int() % 16], values[every_byte.int() // 16]), -1)
    per_block_scale = scale.float() * scale_2
    expected = (pairs.view(64, -1, 16) * per_block_scale.unsqueeze(-1)).view(64, 512)
    assert torch.equal(dequantize(from_modelopt_nvfp4(every_byte, scale, scale_2)), expected)
    with pytest.raises(ValueError, match=r"weight_scale_2 has shape \[2\], expected \[1\]"):
        from_modelopt_nvfp4(every_byte, scale, scale_2.repeat(2))


# gpt-oss


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((2, 8, 4, 8), (2, 8, 4), r"blocks has shape \[2, 8, 4, 8\], expected \[experts, N"),
        ((2, 8, 4, 16), (2, 8, 3), r"scales has shape \[2, 8, 3\], expected \[2, 8, 4\]"),
    ],
)
def test_mxfp4_blocks_refuse_inconsistent_tensors_by_name(
    blocks: tuple[int, ...], scales: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_mxfp4_blocks(torch.zeros(blocks).byte(), torch.zeros(scales).byte())
