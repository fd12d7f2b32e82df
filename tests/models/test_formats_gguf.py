"""GGUF's block formats against the gguf package: every bit of random blocks, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiledllm.models.formats.codes import dequantize
from compiledllm.models.formats.gguf_blocks import KINDS, from_gguf

gguf = pytest.importorskip("gguf")

# Bytes at which a block has float16 numbers.
FLOATS = dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)) | {"Q6_K": (208,)}


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 5), num_blocks=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_random_blocks_have_the_package_s_bits(
    kind: str, n: int, num_blocks: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    num_bytes = KINDS[kind].num_bytes
    blocks = draw.integers(0, 256, (n, num_blocks, num_bytes), dtype=np.uint8)
    for start in FLOATS.get(kind, (0,)):
        values = draw.standard_normal((n, num_blocks, 1)).astype(np.float16)
        blocks[..., start : start + 2] = values.view(np.uint8)
    data = blocks.reshape(n, -1)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    matrix = from_gguf(torch.from_numpy(data), kind)
    assert torch.equal(
        dequantize(matrix).view(torch.int32), torch.from_numpy(expected).view(torch.int32)
    )
    assert matrix.codes.is_contiguous() and matrix.scales.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_matrix_is_hardly_larger_than_the_file(kind: str) -> None:
    """With 4-bit codes packed; Q5 and Q6 pay for being stored as 8 bits."""
    data = torch.zeros(4, KINDS[kind].num_bytes * 2, dtype=torch.uint8)
    matrix = from_gguf(data, kind)
    num_bytes = matrix.codes.numel() / (2 if matrix.code == "int4" else 1)
    parts = (matrix.scales, matrix.minima, matrix.super_scales, matrix.super_minima)
    num_bytes += sum(part.nbytes for part in parts if part is not None)
    grown = {"Q5": 3 / 8, "Q6": 2 / 8}.get(kind[:2], 0) * matrix.codes.numel()
    assert num_bytes - grown <= 1.03 * data.numel()


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
    with pytest.raises(ValueError, match="Q8_0 data holds an infinity or NaN"):
        from_gguf(torch.full((2, 34), 255).byte(), "Q8_0")
