"""compressed-tensors files against the library's own reading of the same tensors."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix, dequantize, one_level
from compiledllm.models.formats.compressed_tensors import (
    from_float_quantized,
    from_int_quantized,
    from_mxfp4_pack_quantized,
    from_nvfp4_pack_quantized,
    from_pack_quantized,
)

pytestmark = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="needs compressed-tensors"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def read_by_library(file_format: str, tensors: dict[str, Tensor], **weights: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(file_format)
    return compressor.decompress(tensors, scheme)["weight"]


def pack_to_int32(values: Tensor, num_bits: int, packed_dim: int = 1) -> Tensor:
    from compressed_tensors.compressors.pack_quantized import helpers

    packed: Tensor = helpers.pack_to_int32(values, num_bits, packed_dim)
    return packed


def assert_read_alike(matrix: QuantizedMatrix, expected: Tensor) -> None:
    """Equal in float32 after the one rounding to the dtype in which the library computes."""
    assert torch.equal(dequantize(matrix).to(expected.dtype), expected)


def integers(num_bits: int, *shape: int) -> Tensor:
    half = 2 ** (num_bits - 1)
    return torch.randint(-half, half, shape).to(torch.int8)


@given(
    num_bits=st.integers(1, 8),
    n=st.integers(1, 20),
    num_groups=st.integers(1, 4),
    group=st.integers(1, 40),
    is_symmetric=st.booleans(),
    is_channel=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_pack_quantized(
    num_bits: int,
    n: int,
    num_groups: int,
    group: int,
    is_symmetric: bool,
    is_channel: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    k = num_groups * group
    columns = 1 if is_channel else num_groups
    tensors = {
        "weight_packed": pack_to_int32(integers(num_bits, n, k), num_bits),
        "weight_scale": torch.randn(n, columns).to(dtype),
        "weight_shape": torch.tensor([n, k]),
    }
    if not is_symmetric:
        zeros = pack_to_int32(integers(num_bits, n, columns), num_bits, packed_dim=0)
        tensors["weight_zero_point"] = zeros.contiguous()
    size = {} if is_channel else {"group_size": group}
    matrix = from_pack_quantized(**tensors, num_bits=num_bits, **size)
    strategy = "channel" if is_channel else "group"
    expected = read_by_library(
        "pack-quantized",
        tensors,
        num_bits=num_bits,
        type="int",
        symmetric=is_symmetric,
        strategy=strategy,
        **size,
    )
    assert_read_alike(matrix, expected)
    assert matrix.code == ("int4" if num_bits <= 4 else "int8")
    assert matrix.codes.is_contiguous() and matrix.scales.dtype == dtype


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_smallest_matrix_whose_zeros_are_one_word(num_bits: int) -> None:
    """torch keeps the strides of a transposed tensor with a single column."""
    zeros = integers(num_bits, 2, 2)
    matrix = from_pack_quantized(
        pack_to_int32(integers(num_bits, 2, 2), num_bits),
        torch.ones(2, 2),
        torch.tensor([2, 2]),
        num_bits=num_bits,
        group_size=1,
        weight_zero_point=pack_to_int32(zeros, num_bits, packed_dim=0).contiguous(),
    )
    assert matrix.zeros is not None
    offset = 2 ** (num_bits - 1) if num_bits <= 4 else 0
    assert torch.equal(matrix.zeros.to(torch.int8), zeros + offset)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_pack_quantized_with_activation_order(num_bits: int) -> None:
    """Column k belongs to group g_idx[k]; the library wrote such files until August 2026."""
    n, k, group = 8, 96, 32
    values, scale = integers(num_bits, n, k), torch.rand(n, 3)
    zeros = integers(num_bits, n, 3)
    g_idx = (torch.arange(k) // group)[torch.randperm(k)].int()
    matrix = from_pack_quantized(
        pack_to_int32(values, num_bits),
        scale,
        torch.tensor([n, k]),
        num_bits=num_bits,
        group_size=group,
        weight_zero_point=pack_to_int32(zeros, num_bits, packed_dim=0),
        weight_g_idx=g_idx,
    )
    of_column = g_idx.long()
    expected = (values.float() - zeros[:, of_column].float()) * scale[:, of_column]
    assert torch.equal(dequantize(matrix), expected)
    assert matrix.permutation is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(
    ("strategy", "scales"), [("tensor", (1,)), ("channel", (12, 1)), ("group", (12, 4))], ids=str
)
def test_int_quantized(
    strategy: str, scales: tuple[int, ...], is_symmetric: bool, dtype: torch.dtype
) -> None:
    tensors = {"weight": integers(8, 12, 64), "weight_scale": torch.rand(scales).to(dtype)}
    if not is_symmetric:
        tensors["weight_zero_point"] = integers(8, *scales)
    size = {"group_size": 16} if strategy == "group" else {}
    args = {"num_bits": 8, "type": "int", "symmetric": is_symmetric, "strategy": strategy}
    expected = read_by_library("int-quantized", tensors, **args, **size)
    assert_read_alike(from_int_quantized(**tensors, **size), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("strategy", "scales", "config"),
    [
        ("tensor", (1,), {}),
        ("channel", (200, 1), {}),
        ("block", (2, 3), {"block_structure": (128, 128)}),
        ("group", (200, 9), {"group_size": 32}),
    ],
    ids=str,
)
def test_float_quantized(
    strategy: str, scales: tuple[int, ...], config: dict[str, Any], dtype: torch.dtype
) -> None:
    weight = (torch.randn(200, 288) * 100).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": torch.rand(scales).to(dtype)}
    wanted = {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **wanted}
    if strategy == "block":  # the library dequantises whole blocks only
        padded = torch.zeros(256, 384).to(torch.float8_e4m3fn)
        padded[:200, :288] = weight
        expected = read_by_library("float-quantized", {**tensors, "weight": padded}, **args)
        expected = expected[:200, :288]
    else:
        expected = read_by_library("float-quantized", tensors, **args)
    assert_read_alike(from_float_quantized(**tensors, **config), expected)


def test_nvfp4_global_scale_divides() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    tensors = {
        "weight_packed": every_byte,
        "weight_scale": (torch.rand(64, 32) * 448).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([2688 / 0.37]),
    }
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
    expected = read_by_library("nvfp4-pack-quantized", dict(tensors), **args, group_size=16)
    matrix = from_nvfp4_pack_quantized(**tensors)
    assert_read_alike(matrix, expected)
    tensors["weight_global_scale"] *= 2
    assert torch.equal(dequantize(from_nvfp4_pack_quantized(**tensors)), dequantize(matrix) / 2)


@given(st.floats(2.0**-40, 2.0**40, width=32))
def test_nvfp4_scales_are_the_library_s_quotients(global_scale: float) -> None:
    """Bit for bit, although the factor is a reciprocal (in float64)."""
    every_scale = torch.arange(126, dtype=torch.uint8).add(1).view(torch.float8_e4m3fn).view(1, -1)
    packed = torch.zeros(1, 126 * 8, dtype=torch.uint8)
    divisor = torch.tensor([global_scale])
    matrix = one_level(from_nvfp4_pack_quantized(packed, every_scale, divisor))
    assert torch.equal(matrix.scales, every_scale.float() / divisor)


def test_mxfp4_every_byte_under_every_scale() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(32, 1)
    exponents = torch.arange(512).clamp(max=254).to(torch.uint8).view(32, 16)
    tensors = {"weight_packed": every_byte, "weight_scale": exponents}
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group"}
    args |= {"group_size": 32, "scale_dtype": torch.uint8}
    expected = read_by_library("mxfp4-pack-quantized", dict(tensors), **args)
    assert_read_alike(from_mxfp4_pack_quantized(**tensors), expected)


PACKED = torch.zeros(16, 8, dtype=torch.int32)
SHAPE = torch.tensor([16, 64])
SCALE = torch.ones(16, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 9}, "num_bits is 9, expected 1 to 8"),
        ({"num_bits": 8}, r"weight_packed has shape \[16, 8\], expected \[16, 16\]"),
        ({"weight_packed": PACKED.long()}, "weight_packed has dtype int64, expected int32"),
        ({"weight_packed": PACKED[0]}, r"weight_packed has shape \[8\], expected a matrix"),
        ({"weight_shape": torch.tensor([16, 128])}, r"weight_packed has shape \[16, 8\]"),
        ({"weight_shape": torch.tensor([16])}, r"weight_shape has shape \[1\], expected \[2\]"),
        ({"weight_scale": SCALE[:, :1]}, r"weight_scale has shape \[16, 1\], expected \[16, 2\]"),
        ({"weight_scale": SCALE / 0}, "weight_scale holds an infinity or NaN"),
        ({"weight_scale": SCALE.int()}, "weight_scale has dtype int32"),
        ({"group_size": 24}, "64 inputs, which are not whole groups of 24"),
        ({"group_size": None}, r"weight_scale has shape \[16, 2\], expected \[16, 1\]"),
        ({"weight_zero_point": PACKED}, r"weight_zero_point has shape .* expected \[2, 2\]"),
        ({"weight_g_idx": torch.zeros(32).int()}, r"weight_g_idx has shape \[32\]"),
        ({"weight_g_idx": torch.arange(64).int() % 3}, "weight_g_idx does not put 32 inputs"),
    ],
)
def test_inconsistent_tensors_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    good = {"weight_packed": PACKED, "weight_scale": SCALE, "weight_shape": SHAPE}
    good |= {"num_bits": 4, "group_size": 32}
    with pytest.raises(ValueError, match=message):
        from_pack_quantized(**{**good, **changes})


def test_damaged_scales_of_fp4_are_refused_by_name() -> None:
    packed = torch.zeros(4, 32, dtype=torch.uint8)
    scale = torch.full((4, 2), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight_scale holds 255"):
        from_mxfp4_pack_quantized(packed, scale)
    with pytest.raises(ValueError, match=r"weight_scale has shape \[4, 1\], expected \[4, 2\]"):
        from_mxfp4_pack_quantized(packed, scale[:, :1])
    scale = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="weight_global_scale is 0"):
        from_nvfp4_pack_quantized(packed, scale, torch.zeros(1))
    with pytest.raises(ValueError, match=r"weight_scale has shape \[4, 3\], expected \[4, 4\]"):
        from_nvfp4_pack_quantized(packed, scale[:, :3], torch.ones(1))
