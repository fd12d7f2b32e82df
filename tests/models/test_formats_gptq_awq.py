"""GPTQ and AWQ files of small packers, written from the definitions of the public libraries.

A packer writes numbers one at a time, as GPTQModel's `pack` and AutoAWQ's `from_linear` do, so that
it has nothing in common with the code under test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiledllm.models.formats.awq import from_awq
from compiledllm.models.formats.codes import dequantize
from compiledllm.models.formats.gptq import from_gptq

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this column


def words_of(numbers: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """[rows, columns] -> int32 [rows, columns * bits / 32], a word of 32 / bits numbers a time."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    out = torch.zeros(numbers.shape[0], numbers.shape[1] // per_word, dtype=torch.int64)
    for word in range(out.shape[1]):
        for i, column in enumerate(order):
            out[:, word] |= numbers[:, word * per_word + column].long() << (bits * i)
    return as_int32(out)


def as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_file(
    codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, version: int
) -> dict[str, Tensor]:
    """codes [K, N], zeros and scales [G, N], as a file has them."""
    qzeros = words_of(zeros, bits)
    if version == 1:  # GPTQModel: `qzeros -= 0b...0001_0001`, on whole words
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = as_int32((qzeros.long() - ones) % 2**32)
    qweight = words_of(codes.T, bits).T.contiguous()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx.int()}


@given(
    bits=st.sampled_from([2, 4, 8]),
    version=st.sampled_from([1, 2]),
    is_symmetric=st.booleans(),
    is_ordered=st.booleans(),
    num_words=st.integers(1, 6),
    group=st.sampled_from([-1, 16, 32, 48, 64]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_gptq(
    bits: int,
    version: int,
    is_symmetric: bool,
    is_ordered: bool,
    num_words: int,
    group: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """As GPTQModel's torch code: scales[g_idx] * (weight - zeros[g_idx]); partial groups too."""
    torch.manual_seed(seed)
    k, n = num_words * 16, 32
    size = k if group == -1 else group
    num_groups = -(-k // size)
    codes = torch.randint(0, 2**bits, (k, n))
    zeros = torch.randint(0, 2**bits, (num_groups, n))
    if is_symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = torch.randn(num_groups, n).to(dtype)
    g_idx = torch.arange(k) // size
    if not is_ordered:
        g_idx = g_idx[torch.randperm(k)]
    tensors = gptq_file(codes, zeros, scales, g_idx, bits, version)
    config = {"bits": bits, "group_size": group, "is_symmetric": is_symmetric, "version": version}
    matrix = from_gptq(**tensors, **config)
    by_library = scales[g_idx] * (codes - zeros[g_idx])  # in the scales' dtype
    assert torch.equal(dequantize(matrix).to(dtype), by_library.T)
    exact = scales[g_idx].double() * (codes - zeros[g_idx])
    assert torch.equal(dequantize(matrix), exact.T.float())
    assert matrix.code == ("int8" if bits == 8 else "int4")
    assert (matrix.zeros is None) == is_symmetric


def small_gptq(**changes: Tensor) -> dict[str, Tensor]:
    codes = torch.randint(0, 16, (64, 16))
    zeros, scales = torch.full((2, 16), 8), torch.ones(2, 16).half()
    return gptq_file(codes, zeros, scales, torch.arange(64) // 32, 4, 1) | changes


CONFIG = {"bits": 4, "group_size": 32, "is_symmetric": True}


def test_gptq_order_keeps_equal_groups_in_their_order() -> None:
    g_idx = torch.arange(64) % 2
    tensors = small_gptq(g_idx=g_idx.int())
    matrix = from_gptq(**tensors, **CONFIG)
    assert matrix.permutation is not None
    assert matrix.permutation.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]


@pytest.mark.parametrize("g_idx", [None, torch.zeros(64), torch.arange(64) // 32])
def test_gptq_in_order_has_no_permutation(g_idx: Tensor | None) -> None:
    """Also files whose `g_idx` was never filled, as exllama's loaders read them."""
    tensors = small_gptq() | {"g_idx": None if g_idx is None else g_idx.int()}
    matrix = from_gptq(**tensors, **CONFIG)
    assert matrix.permutation is None and matrix.scales.shape == (16, 2)


def test_gptq_zero_of_0_in_version_1_leaves_its_neighbours_alone() -> None:
    zeros = torch.tensor([[0, 5, 15, 0, 0, 1, 8, 15]])
    tensors = gptq_file(
        torch.zeros(8, 8).long(), zeros, torch.ones(1, 8), torch.zeros(8), 4, version=1
    )
    matrix = from_gptq(**tensors, bits=4, group_size=-1, is_symmetric=False)
    assert matrix.zeros is not None and matrix.zeros.flatten().tolist() == zeros.flatten().tolist()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"bits": 3}, "bits is 3, supported: 2, 4, 8"),
        ({}, {"version": 3}, "version is 3, supported: 1, 2"),
        ({}, {"group_size": 0}, "group_size is 0"),
        ({}, {"group_size": 64}, r"qzeros has shape \[2, 2\], expected \[1, 2\]"),
        ({}, {"version": 2}, "qzeros holds a zero of 7, where a symmetric matrix of 4 bits has 8"),
        ({"qweight": torch.zeros(8, 16)}, {}, "qweight has dtype float32, expected int32"),
        (
            {"qweight": torch.zeros(4, 16).int()},
            {},
            r"qzeros has shape \[2, 2\], expected \[1, 2\]",
        ),
        ({"qzeros": torch.zeros(2, 2)}, {}, "qzeros has dtype float32"),
        ({"scales": torch.ones(16, 2)}, {}, r"scales has shape \[16, 2\], expected \[2, 16\]"),
        ({"scales": torch.ones(2, 16) / 0}, {}, "scales holds an infinity or NaN"),
        ({"g_idx": torch.zeros(8).int()}, {}, r"g_idx has shape \[8\], expected \[64\]"),
        ({"g_idx": torch.arange(64).int() // 16}, {}, "g_idx does not put 32 inputs into each"),
        ({"g_idx": torch.zeros(64)}, {}, "g_idx has dtype float32"),
    ],
)
def test_gptq_refuses_inconsistent_tensors_by_name(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_gptq(**small_gptq(**tensors), **{**CONFIG, **config})


# AWQ


@given(
    num_groups=st.integers(1, 4),
    group=st.sampled_from([-1, 16, 32]),
    num_words=st.integers(1, 5),
    has_zeros=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_awq(
    num_groups: int, group: int, num_words: int, has_zeros: bool, dtype: torch.dtype, seed: int
) -> None:
    """As AutoAWQ's `dequantize_gemm`: (iweight - izeros) * scales."""
    torch.manual_seed(seed)
    num_groups = 1 if group == -1 else num_groups
    k, n = num_groups * (24 if group == -1 else group), num_words * 8
    codes, zeros = torch.randint(0, 16, (k, n)), torch.randint(0, 16, (num_groups, n))
    scales = torch.randn(num_groups, n).to(dtype)
    qweight, qzeros = words_of(codes, 4, AWQ_ORDER), words_of(zeros, 4, AWQ_ORDER)
    if not has_zeros:
        zeros = torch.full_like(zeros, 8)
    matrix = from_awq(qweight, qzeros if has_zeros else None, scales, group_size=group)
    rows = torch.arange(k) * num_groups // k
    by_library = (codes.to(torch.int8) - zeros[rows].to(torch.int8)) * scales[rows]
    assert torch.equal(dequantize(matrix).to(dtype), by_library.T)
    exact = (codes - zeros[rows]) * scales[rows].double()
    assert torch.equal(dequantize(matrix), exact.T.float())


def test_awq_columns_are_where_compressed_tensors_converter_finds_them() -> None:
    """The converter has AutoAWQ's `unpack_awq` and `reverse_awq_order`."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    words = torch.randint(-(2**31), 2**31, (32, 6)).int()
    zeros = torch.randint(-(2**31), 2**31, (2, 6)).int()
    unpacked = AutoAWQConverter.unpack_awq(words, zeros, 4)
    weight, zero = (part & 15 for part in AutoAWQConverter.reverse_awq_order(*unpacked, 4))
    matrix = from_awq(words, zeros, torch.ones(2, 48), group_size=16)
    assert matrix.zeros is not None
    assert torch.equal(matrix.codes.T, weight) and torch.equal(matrix.zeros.T, zero)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "version is 'gemv', a packing for another kernel; supported: gemm"),
        ({"version": "gemv_fast"}, "version is 'gemv_fast'"),
        ({"bits": 8}, "bits is 8, supported: 4"),
        ({"group_size": 24}, "64 inputs, which are not whole groups of 24"),
        ({"group_size": 16}, r"scales has shape \[2, 16\], expected \[4, 16\]"),
        ({"qzeros": torch.zeros(2, 16).int()}, r"qzeros has shape \[2, 16\], expected \[2, 2\]"),
        ({"qweight": torch.zeros(64, 2).long()}, "qweight has dtype int64, expected int32"),
        ({"qweight": torch.zeros(64).int()}, r"qweight has shape \[64\], expected a matrix"),
        ({"scales": torch.ones(2, 16).int()}, "scales has dtype int32"),
    ],
)
def test_awq_refuses_inconsistent_tensors_by_name(changes: dict[str, Any], message: str) -> None:
    good = {"qweight": torch.zeros(64, 2).int(), "qzeros": torch.zeros(2, 2).int()}
    good |= {"scales": torch.ones(2, 16), "group_size": 32}
    with pytest.raises(ValueError, match=message):
        from_awq(**{**good, **changes})
