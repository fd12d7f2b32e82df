"""GGUF's block formats against the gguf package: every bit of random blocks, in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiledllm.kernels.quantized import dequantize_packed
from compiledllm.models.formats.codes import dequantize
from compiledllm.models.formats.gguf_blocks import KINDS, from_gguf
from compiledllm.models.formats.quantized import Quantized
from tests.support.gguf_blocks import random_blocks

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 5), num_blocks=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_random_blocks_have_the_package_s_bits(
    kind: str, n: int, num_blocks: int, seed: int
) -> None:
    data = random_blocks(kind, n, num_blocks, seed)
    expected = dequantized_by_the_package(data, kind)
    matrix = from_gguf(data, kind)
    assert torch.equal(dequantize(matrix).view(torch.int32), expected.view(torch.int32))
    assert matrix.codes.is_contiguous() and matrix.scales.is_contiguous()


def dequantized_by_the_package(data: torch.Tensor, kind: str) -> torch.Tensor:
    values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_in_memory_has_the_package_s_bits_and_hardly_more_bytes(kind: str) -> None:
    """Two parts of one matrix, as the loader puts them. Q5 and Q6 pay for being kept as 8 bits."""
    format, parts = Quantized(KINDS[kind].spec), {"gate": 3, "up": 2}
    num_inputs = 256 * 2 if "K" in kind else 32 * 3
    params = [*format.parameters(parts, num_inputs).values()]
    data = random_blocks(kind, 5, 2 if "K" in kind else 3, seed=7)
    slots = format.slots(parts, num_inputs, params).values()
    for slot, rows in zip(slots, (slice(3), slice(3, 5)), strict=True):
        slot.put(from_gguf(data[rows], kind))
    codes, scales, zeros, _, minima, factors = params
    found = dequantize_packed(codes, scales, zeros, format.spec.code, num_inputs, minima, factors)
    expected = dequantized_by_the_package(data, kind)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    x = torch.randn(2, num_inputs)
    torch.testing.assert_close(format.product(x, params, None), x @ expected.T)
    torch.testing.assert_close(format.product(x, params, None, 3), x @ expected[3:].T)
    num_bytes = sum(part.nbytes for part in params if part is not None)
    assert num_bytes == format.spec.num_bytes(5, num_inputs)
    in_file = data.numel() + {"5": 3 / 8, "6": 2 / 8}.get(kind[1], 0) * expected.numel()
    assert num_bytes - 5 * (-num_inputs % 128) / 2 * 1.25 <= 1.04 * in_file


def test_parts_with_and_without_minima_are_not_one_matrix() -> None:
    format = Quantized(KINDS["Q4_0"].spec)
    params = [*format.parameters({"": 2}, 32).values()]
    (slot,) = format.slots({"": 2}, 32, params).values()
    with pytest.raises(ValueError, match="minima beside their scales"):
        slot.put(from_gguf(random_blocks("Q4_1", 2, 1, seed=0), "Q4_1"))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_block_are_the_package_s(kind: str) -> None:
    _, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert KINDS[kind].num_bytes == num_bytes


def test_what_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="type IQ2_XS cannot stay quantised; supported: Q4_0, "):
        from_gguf(torch.zeros(2, 18).byte(), "IQ2_XS")
    with pytest.raises(ValueError, match="rows of 35 bytes, expected whole Q8_0 blocks of 34"):
        from_gguf(torch.zeros(2, 35).byte(), "Q8_0")
    with pytest.raises(ValueError, match="data has dtype int8, expected uint8"):
        from_gguf(torch.zeros(2, 34, dtype=torch.int8), "Q8_0")
    blocks = random_blocks("Q4_K", 2, 1, seed=0)
    blocks[1, 2:4] = 255
    with pytest.raises(ValueError, match="field 'dmin' of Q4_K data holds an infinity or NaN"):
        from_gguf(blocks, "Q4_K")
    with pytest.raises(ValueError, match="field 'd' of Q8_0 data holds an infinity or NaN"):
        from_gguf(torch.full((2, 34), 255).byte(), "Q8_0")
